"""Hold the net, its optimizer and the training step, and save and restore their state."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pipeline.manifest import Class
from pipeline.messages import join_names, one_line
from trainer import checkpoint
from trainer.build import build_model, last_layer, shapes_of
from trainer.optim import make_optimizer
from trainer.precision import resolve_precision
from trainer.processes.distributed import World
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError
from trainer.step import Step, state_of


class Learner:
    """The net of this process with its optimizer; after each step, all processes have equal weights."""

    def __init__(self, settings: Settings, classes: int, world: World):
        self.settings, self.world = settings, world
        self.model = build_model(settings, classes, world.device, settings.form)
        self.optimizer = make_optimizer(self.model, settings)
        self.precision = resolve_precision(settings.precision, world.device)
        trained: Callable[[Tensor], Tensor] = self.model
        if world.size > 1:
            # Gradients are views of the buckets that are summed over the processes, which saves a copy.
            trained = replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            if settings.gradients == "bf16":
                replica.register_comm_hook(None, _sum_in_bf16)
        if settings.compile:
            trained = torch.compile(trained)
        skip = settings.on_nan == "skip"
        self.watched = state_of(self.model)
        self.step = Step(trained, self.optimizer, self.precision, world.device, skip, self.watched)

    def load_initial_weights(self, folder: Path, classes: Sequence[Class], layers: str = "all") -> str:
        """Load the newest weights of another run.

        layers: `all`, of which the last is left out if the classes differ, or `convolutions`, of which those
        that only one of the nets has are left out. Returns a note for the log. Raises SettingsError if there
        is no such run, or if a layer of its net has another shape.
        """
        run = Run(folder)
        same_classes = [c.id for c in run.net(run.settings()).classes] == [c.id for c in classes]
        state, _ = checkpoint.load(run.checkpoints, self.step.device)
        if state is None:
            raise SettingsError(f"--initial-weights {folder} has no checkpoint yet: train that run first")
        ours, theirs, note = self.model.state_dict(), state["model"], ""
        if layers == "convolutions":
            shared = {name for name in ours.keys() & theirs if name.startswith("conv")}
            theirs, note = ours | {name: theirs[name] for name in shared}, ", convolutions only"
        elif not same_classes:
            last = last_layer(self.model, self.settings, len(classes))
            theirs |= {name: ours[name] for name in last}
            note = f", with a new {', '.join(sorted({name.rpartition('.')[0] for name in last}))}"
        if differing := sorted({name for name, _ in shapes_of(ours).items() ^ shapes_of(theirs).items()}):
            raise SettingsError(
                f"--initial-weights {folder} belongs to another net, which differs in {join_names(differing)}"
            )
        self.model.load_state_dict(theirs)
        return f"starting from the weights of {folder} after step {state['step']}{note}"

    def share_buffers(self) -> None:
        """Give all processes the first one's buffers, which its checkpoint holds.

        In training, each process updates buffers by its own images, such as the statistics of BatchNorm.
        """
        if self.world.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; its tensors are references, not copies."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. Raises RunError if it is that of another net."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step.scaler.load_state_dict(state["scaler"])
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint does not match the net ({one_line(error)}): restore the code of the net "
                "that the run began with, or choose another --out"
            ) from None


def _sum_in_bf16(state: None, bucket: dist.GradBucket) -> Future[Tensor]:
    """Call torch's own hook. Torch would reject that hook itself with gloo, which can sum bf16, too."""
    return bf16_compress_hook(None, bucket)  # type: ignore[arg-type]  # None means all processes
