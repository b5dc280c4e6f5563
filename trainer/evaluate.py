"""Top-1 and top-5 error over a split, every image once whatever the number of processes."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet
from pipeline.loader import Batch, Dataset, evaluation_loader
from trainer import checkpoint
from trainer.build import build_decoding, build_model
from trainer.monitor.metrics import Metrics
from trainer.monitor.moment import Lead
from trainer.precision import autocast, prepare, resolve_precision
from trainer.processes import distributed
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings, SettingsError

PROTOCOLS = {1: "centre", 10: "ten"}


@dataclass(frozen=True)
class Scores:
    """Errors are ratios 0 to 1; loss is the mean cross-entropy, of the mean probability with ten crops."""

    top1_error: float
    top5_error: float
    loss: float
    images: int


def log_probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    """[n,3,h,w] or [n,crops,3,h,w] → [n,classes], averaging the crops' softmax (section 4.1)."""
    if pixels.dim() == 4:
        return F.log_softmax(model(pixels).float(), 1)
    crops = pixels.shape[1]
    logits = model(pixels.flatten(0, 1)).float()
    return F.log_softmax(logits, 1).unflatten(0, (-1, crops)).logsumexp(1) - math.log(crops)


def count_errors(scores: Tensor, labels: Tensor) -> Tensor:
    """How many rows of [n,classes] lack their label among the best one and the best five: [2]."""
    best = scores.topk(min(5, scores.shape[1])).indices
    hits = best == labels[:, None]
    return torch.stack([(~hits[:, 0]).sum(), (~hits.any(1)).sum()])


@torch.inference_mode()
def evaluate(
    model: nn.Module, precision: str, batches: Iterable[tuple[Tensor, Tensor]], world: World, metrics: Metrics
) -> Scores:
    """Evaluate over this process's batches and add up those of all processes; without any, scores are NaN."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    lead = Lead(world.device)
    waiting = time.monotonic()
    begun = waiting
    for pixels, labels in batches:
        metrics.input_wait_seconds["eval"].observe(time.monotonic() - waiting)
        lead.hold()
        with autocast(precision, world.device):
            scores = log_probabilities(model, prepare(pixels, precision))
        loss = F.nll_loss(scores, labels, reduction="sum")
        sums[:3] += torch.stack([*count_errors(scores, labels), loss])
        sums[3] += len(labels)
        metrics.images["eval"].inc(len(labels))
        metrics.progress()
        now = time.monotonic()
        metrics.step_seconds["eval"].observe(now - begun)
        waiting = begun = now
    model.train()
    sums = world.sum(sums)
    top1, top5, loss = (sums[:3] / sums[3]).tolist()
    return Scores(top1, top5, loss, int(sums[3]))


class Trained(NamedTuple):
    """A net as a checkpoint has it, and what it was trained with."""

    model: AlexNet
    settings: Settings
    dataset: Dataset
    step: int
    notes: list[str]  # of damaged checkpoints that were passed over

    def batches(self, split: str, crops: int, world: World) -> Iterable[Batch]:
        """A process's share of a split, by crops of the model's own size."""
        return evaluation_loader(
            self.dataset,
            split,
            max(1, self.settings.evaluation_batch // crops),
            build_decoding(self.settings, world.device),
            crops=crops,
            rank=world.rank,
            world=world.size,
        )


def load_trained(settings: Settings, run: Run, device: torch.device, best: bool = False) -> Trained:
    """The newest checkpoint of a run, or the best, on the dataset of the settings, minus the run's mean.

    Raises SettingsError where that has other classes than the run was trained on, and what `load_net` does.
    """
    spec = run.net(settings)
    dataset = Dataset(settings.data, spec.mean)
    model, step, notes = load_net(settings, run, device, best)
    classes = dataset.manifest.classes
    if model.fc8.out_features != len(classes) or [c.id for c in spec.classes] != [c.id for c in classes]:
        raise SettingsError(
            f"the run in {run.folder} was trained on other classes ({model.fc8.out_features}) than those of "
            f"{settings.data} ({len(classes)}): give the dataset that it was trained on with --data"
        )
    return Trained(model, settings, dataset, step, notes)


def load_net(
    settings: Settings, run: Run, device: torch.device, best: bool = False
) -> tuple[AlexNet, int, list[str]]:
    """The net of the newest checkpoint of a run, or of the best; its step; and a line about each damaged
    one that was passed over.

    Raises SettingsError where there is no checkpoint yet, and RunError where all are damaged.
    """
    state, notes = checkpoint.load(run.checkpoints, device, "best" if best else "*")
    if state is None:
        raise SettingsError(f"no checkpoint in {run.checkpoints} yet: train first, an epoch for the best")
    model = build_model(settings, len(state["model"]["fc8.bias"]), device)
    model.load_state_dict(state["model"])
    return model, state["step"], notes


def evaluate_run(settings: Settings, run: Run, split: str, crops: int, best: bool = False) -> str:
    """Evaluate the newest checkpoint of a run, or the best; returns a line that says what came of it.

    Raises what `load_trained` does.
    """
    world = distributed.join(settings.device)
    try:
        trained = load_trained(settings, run, world.device, best)
        precision = resolve_precision(settings.precision, world.device)
        batches = trained.batches(split, crops, world)
        scores = evaluate(trained.model, precision, batches, world, Metrics())
    finally:
        distributed.leave()
    return "\n".join(
        [
            *trained.notes,
            f"step {trained.step}, {split}, {PROTOCOLS[crops]} crop{'s' if crops > 1 else ''}: top-1 error "
            f"{scores.top1_error:.2%}, top-5 error {scores.top5_error:.2%}, loss {scores.loss:.4f} "
            f"over {scores.images:,} images",
        ]
    )
