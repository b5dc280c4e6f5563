"""Join the processes of a run, which torchrun or trainer/processes/launch.py started, and communicate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.processes.launch import count_gpus
from trainer.processes.ranks import read_ranks
from trainer.run import PeerLostError, RunError
from trainer.settings import SettingsError


@dataclass(frozen=True)
class World:
    """The place of this process among the processes of the run, and its device.

    rank: index of this process in the run. size: number of processes. local_rank: index of this process among
    those on this machine.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which alone writes the run folder."""
        return self.rank == 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device executes work after the host has queued it, as a GPU does."""
        return self.device.type == "cuda"

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum values over all processes, in place, and return them. All processes must call this."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. All must call this; it waits for their devices."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)))

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value, which can be pickled. All processes must call this."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, which can be pickled, by rank. All processes must call this."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_same_checkpoint(self, found: str, remedy: str) -> None:
        """Raise RunError if the processes found different checkpoints. All processes must call this.

        found: the checkpoint of this process. remedy: what to do, in a sentence without its full stop.
        """
        first, *others = self.gather(found)
        if other := next((each for each in others if each != first), None):
            raise RunError(
                f"the processes found different checkpoints: {first}; but another one is {other}. {remedy}"
            )

    @property
    def device_name(self) -> str:
        """The name of the GPU model, or `CPU`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def join(device: str, patience: timedelta | None = None) -> World:
    """Join the process group of the run, if it has several processes, and select this process's device.

    device: `auto`, `cuda`, `cuda:N` or `cpu`. patience: for how long to wait for another process before this
    one ends; by default that of NCCL or Gloo.

    Raises SettingsError if there is no such GPU, or if the variables of torchrun are not valid.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"--device {device}: torch finds no GPU here; omit --device to train on the CPU")
    rank, size, local_rank, *_ = read_ranks()
    on_gpu = device != "cpu" and torch.cuda.is_available()
    own = torch.device("cuda", _gpu_index(device, local_rank)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
        torch.backends.cudnn.allow_tf32 = False  # by default, convolutions round their inputs
    elif device == "auto" and size > 1 and (gpus := count_gpus()):
        raise SettingsError(
            f"the driver has {gpus} GPUs, but torch cannot use them: alexnet-train doctor says more, and "
            "--device cpu trains on the CPU"
        )
    if size > 1:
        backend, bound = ("nccl", own) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=patience, device_id=bound)
    return World(rank, size, local_rank, own)


def _gpu_index(device: str, local_rank: int) -> int:
    """Return the index of this process's GPU. Raises SettingsError if there is no such GPU."""
    index, gpus = int(device.partition(":")[2] or local_rank), torch.cuda.device_count()
    if index >= gpus:
        raise SettingsError(f"--device {device}: there is no GPU {index}, only {gpus}, numbered from 0")
    return index


@contextmanager
def raising_peer_lost() -> Iterator[None]:
    """Replace the errors that torch raises when another process of the run has ended by PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise PeerLostError(
            f"rank {read_ranks().rank} has lost another process of the run, whose own error may say why. "
            "Run the same command again to continue from the last checkpoint"
        ) from error


def leave() -> None:
    """Leave the process group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()
