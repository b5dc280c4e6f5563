"""The process group of a run, set up by torchrun or trainer/processes/launch.py, or a single process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.processes.place import place
from trainer.run import LostError
from trainer.settings import SettingsError


@dataclass(frozen=True)
class World:
    """This process and its place among those of the run. local_rank: its rank on this machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device works asynchronously, while the host goes on."""
        return self.device.type == "cuda"

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. Several processes wait for their devices."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def share(self, value: Any) -> Any:
        """Return the first process's value in all processes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def join(device: str) -> World:
    """Join the run's processes. device: `auto`, `cuda`, `cuda:N` or `cpu`.

    Raises SettingsError if there is no such GPU, or if the environment's variables make no sense.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"--device {device}: torch finds no GPU here; omit --device to train on the CPU")
    rank, size, local_rank, *_ = place()
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", _gpu(device, local_rank)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    if size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=where if on_gpu else None)
    return World(rank, size, local_rank, where)


def _gpu(device: str, local_rank: int) -> int:
    """Return the index of this process's GPU. Raises SettingsError if there is no such GPU."""
    number, gpus = int(device.partition(":")[2] or local_rank), torch.cuda.device_count()
    if number >= gpus:
        raise SettingsError(f"--device {device}: there is no GPU {number}, only {gpus}, numbered from 0")
    return number


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Turn the errors that torch raises when another process of the run is gone into LostError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise LostError(
            f"rank {place().rank} has lost another process of the run, whose own error may say why. "
            "Run the same command again to continue from the last checkpoint"
        ) from error


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
