"""Measure the top-1 and top-5 error of a net over a split; the processes together count each image once."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Dataset, EvaluationLoader
from pipeline.messages import one_line
from pipeline.remote_errors import redact
from trainer import checkpoint
from trainer.build import build_decoding, build_model
from trainer.details import Recorder, Tally
from trainer.monitor.device_events import RunAheadLimit
from trainer.monitor.metrics import Metrics
from trainer.monitor.summary import TOP5_CLASSES
from trainer.precision import autocast, prepare, resolve_precision
from trainer.processes import distributed
from trainer.processes.distributed import World
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError

PROTOCOLS = {1: "centre", 10: "ten"}  # names of the numbers of crops


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation: errors from 0 to 1, and the mean cross-entropy.

    With fewer than TOP5_CLASSES classes, the top-5 error is 0 and is not to be shown. With ten crops, the
    cross-entropy is that of the mean of the predicted probabilities.
    """

    top1_error: float
    top5_error: float
    loss: float
    images: int


def log_probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    """Map pixels [n,3,h,w] or [n,crops,3,h,w] to log-probabilities [n,classes].

    The probabilities of an image are the mean of those of its crops (section 4.1).
    """
    if pixels.dim() == 4:
        return F.log_softmax(model(pixels).float(), 1)
    crops = pixels.shape[1]
    logits = model(pixels.flatten(0, 1)).float()
    return F.log_softmax(logits, 1).unflatten(0, (-1, crops)).logsumexp(1) - math.log(crops)


def find_best(scores: Tensor) -> Tensor:
    """Return the labels of the five highest scores of each row [n,classes], highest first: [n,≤5]."""
    return scores.topk(min(5, scores.shape[1])).indices


def find_errors(scores: Tensor, labels: Tensor) -> Tensor:
    """Return which rows are top-1 and which are top-5 errors: bool [2,n].

    scores: [n,classes]. labels: [n]. A top-k error is a row whose label is not among its k highest scores.
    """
    hits = find_best(scores) == labels[:, None]
    return torch.stack([~hits[:, 0], ~hits.any(1)])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    precision: str,
    batches: Iterable[Batch],
    world: World,
    metrics: Metrics,
    recorder: Recorder | None = None,
    tally: Tally | None = None,
) -> Scores:
    """Evaluate on this process's batches, and combine the results of all processes.

    recorder: records the details of each batch, for which it waits for the device. tally: counts the errors
    by class of this process, for which nothing waits. The model is in training mode afterwards. If there are
    no batches, the scores are NaN.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    run_ahead = RunAheadLimit(world.device)
    begun = time.monotonic()
    for pixels, labels in batches:
        metrics.input_wait_seconds["eval"].observe(time.monotonic() - begun)
        run_ahead.wait()
        with autocast(precision, world.device):
            scores = log_probabilities(model, prepare(pixels, precision))
        if recorder is not None:
            recorder.add(scores, find_best(scores)[:, 0], labels)
        errors, loss = find_errors(scores, labels), F.nll_loss(scores, labels, reduction="sum")
        if tally is not None:
            tally.add(labels, errors[0])
        sums[:3] += torch.stack([*errors.sum(1), loss])
        sums[3] += len(labels)
        metrics.images["eval"].inc(len(labels))
        metrics.record_progress()
        now = time.monotonic()
        metrics.step_seconds["eval"].observe(now - begun)
        begun = now
    model.train()
    sums = world.all_reduce(sums)
    top1, top5, loss = (sums[:3] / sums[3]).tolist()
    return Scores(top1, top5, loss, int(sums[3]))


class TrainedNet(NamedTuple):
    """A net loaded from a checkpoint, with the settings and the dataset that it was trained with."""

    model: nn.Module
    settings: Settings
    dataset: Dataset
    step: int  # number of steps that the net was trained for
    notes: list[str]  # messages about damaged checkpoints that were skipped

    def batches(self, split: str, crops: int, world: World) -> EvaluationLoader:
        """Return this process's share of a split, with `crops` crops of each image: 1 or 10."""
        return EvaluationLoader(
            self.dataset,
            max(1, self.settings.evaluation_batch // crops),
            split=split,
            crops=crops,
            rank=world.rank,
            world=world.size,
            **vars(build_decoding(self.settings, world.device)),
        )


def load_trained(settings: Settings, run: Run, device: torch.device, best: bool = False) -> TrainedNet:
    """Load the newest or the best checkpoint of a run, and open the dataset that the settings name.

    The run's mean is subtracted from the images of the dataset. Raises SettingsError if its classes are
    not those that the run was trained on, DatasetError if it cannot be read, and otherwise as `load_net`.
    """
    spec = run.net(settings)
    dataset = Dataset(settings.data, spec.mean, cache=settings.cache_options)
    model, step, notes = load_net(settings, run, device, best)
    classes = dataset.manifest.classes
    if [c.id for c in spec.classes] != [c.id for c in classes]:
        raise SettingsError(
            f"the run in {run.folder} was trained on other classes ({len(spec.classes)}) than those of "
            f"{redact(str(settings.data))} ({len(classes)}): give the dataset that it was trained on "
            "with --data"
        )
    return TrainedNet(model, settings, dataset, step, notes)


def load_net(
    settings: Settings, run: Run, device: torch.device, best: bool = False
) -> tuple[nn.Module, int, list[str]]:
    """Load the net of the newest or the best checkpoint of a run.

    Returns the net, its step and a message for each damaged checkpoint that was skipped. Raises SettingsError
    if there is no checkpoint yet or if the net of --net cannot be made, and RunError if all are damaged or if
    the newest one does not match the net in the settings.
    """
    state, notes = checkpoint.load(run.checkpoints, device, "best" if best else "*")
    if state is None:
        missing = "best checkpoint, which the first evaluation gives," if best else "checkpoint"
        raise SettingsError(f"no {missing} in {run.checkpoints} yet: continue the run first")
    try:
        weights, step = state["model"], state["step"]
        model = build_model(settings, len(run.net(settings).classes), device)
        model.load_state_dict(weights)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"the checkpoint in {run.checkpoints} does not match the net in settings.json "
            f"({one_line(error)}): restore both from one copy of the run"
        ) from None
    return model, step, notes


def evaluate_run(
    settings: Settings, run: Run, split: str, crops: int, best: bool = False, out: Path | None = None
) -> str:
    """Evaluate the newest or the best checkpoint of a run. Returns the result as text for the user.

    The text has a line for each damaged checkpoint that was skipped, and a line with the errors and the loss.
    out: folder for the details and a report, which the main process writes.

    Raises as `load_trained` does, and OSError.
    """
    world = distributed.join(settings.device)
    if out and world.is_main:
        out.mkdir(parents=True, exist_ok=True)  # rather than fail after the evaluation
    trained = load_trained(settings, run, world.device, best)
    # A run that is still training may have saved another one.
    world.check_same_checkpoint(f"that of step {trained.step}", "Run the same command again")
    precision = resolve_precision(settings.precision, world.device)
    batches = trained.batches(split, crops, world)
    recorder = Recorder(batches) if out else None
    scores = evaluate(trained.model, precision, batches, world, Metrics(), recorder)
    details = recorder.combine(world) if recorder else None
    distributed.leave()
    classes = trained.dataset.manifest.classes
    top5 = f"top-5 error {scores.top5_error:.2%}, " if len(classes) >= TOP5_CLASSES else ""
    line = (
        f"step {trained.step}, {split}, {PROTOCOLS[crops]} crop{'s' if crops > 1 else ''}: top-1 error "
        f"{scores.top1_error:.2%}, {top5}loss {scores.loss:.4f} over {scores.images:,} images"
    )
    if out and details and world.is_main:
        from trainer.monitor.details_report import write_evaluation

        write_evaluation(out, f"{run.folder.name}: {line}", details, trained.dataset, split)
    return "\n".join([*trained.notes, line])
