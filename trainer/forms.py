"""Choose the form of a run's convolutions (model/forms.py): the fastest on the machine where the run begins.

Forms differ in rounding, so a run keeps its form; otherwise it could not be continued bit for bit. On a GPU,
the forms are measured when a run begins, and the fastest is recorded in a cache for later runs with the same
net, batch size and precision. On a CPU, the choice follows earlier measurements: grouped convolutions are the
fastest in bf16, and in the net of the paper's text, whose towers are joined for each normalisation.
"""

import gc
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from model.alexnet import Variant
from model.forms import GROUPS
from trainer.build import build_decoding
from trainer.environment import environment
from trainer.monitor.ceilings import measure_model
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.setting_groups import ALEXNET, FIXED, Form
from trainer.settings import Settings
from trainer.tuning import load_or_measure

SECONDS = 1.0  # how long to measure each form, after its first steps
CLASSES = 1000  # number of classes of the measured net; it hardly affects the time of a step
_NET = ("preset", "dropout", "crop", "compile", *(field.name for field in fields(Variant)))


class _Cached(TypedDict):
    """An entry of convolutions.json."""

    form: Form


def resolve_run_form(settings: Settings, run: Run, world: World) -> tuple[Settings, list[str]]:
    """Resolve the form of the convolutions. Returns the settings with it, and notes for the log.

    The first process decides for all. The precision of the settings must be resolved already. Raises as
    `Run.recorded_settings` does.
    """
    notes: list[str] = []

    def choose() -> str:
        form, found_notes = fastest_form(settings, world)
        notes.extend(found_notes)
        return form

    form = run.keep_form(choose) if world.is_main else ""
    form, notes = world.broadcast((form, notes))
    return settings.model_copy(update={"convolutions": form}), notes


def fastest_form(settings: Settings, world: World) -> tuple[str, list[str]]:
    """Return the form that the settings name, or else the fastest form here, and notes for the log."""
    if settings.convolutions != "auto":
        return settings.convolutions, []
    if settings.net != ALEXNET or settings.preset in FIXED:
        return "grouped", []
    if world.device.type == "cpu":  # as measured in docs/benchmarks.md
        return "towers" if (settings.preset, settings.precision) == ("code2012", "fp32") else "grouped", []

    def images_per_second(form: str) -> float:
        return measure(settings.model_copy(update={"convolutions": form}), world)

    def measure_all() -> _Cached:
        groups = GROUPS if settings.towers == 2 else GROUPS[:1]
        return {"form": fastest(groups, images_per_second)}  # type: ignore[typeddict-item]

    about = environment(world.device_name)
    machine = [about["device"], about["torch"], torch.backends.cudnn.version()]
    net = {name: getattr(settings, name) for name in _NET}
    key = json.dumps([machine, net, settings.batch // world.size, settings.precision])
    found, notes = load_or_measure("convolutions.json", key, TypeAdapter(_Cached), measure_all, world.is_main)
    return found["form"], [
        f"computing convolutions as {found['form']}, the fastest form on this machine",
        *notes,
    ]


def fastest(groups: Iterable[str], images_per_second: Callable[[str], float]) -> str:
    """Return the fastest form: choose how to compute groups with space-to-depth, then how to compute conv1.

    In the reverse order, an H200 would get a form that is 6 % slower than its fastest (docs/benchmarks.md).
    """
    measured = cache(images_per_second)
    best = max((f"{how}-s2d" for how in groups), key=measured)
    return max((best, best.removesuffix("-s2d")), key=measured)


def measure(settings: Settings, world: World) -> float:
    """Measure the images/s of this process's training steps, without the exchange of gradients.

    Returns 0 for a form that fails on this machine. Raises RuntimeError if `grouped` fails, since no form is
    left to train with.
    """
    images, decoding = settings.batch // world.size, build_decoding(settings, world.device)
    try:
        return measure_model(settings, CLASSES, decoding, images, settings.precision, SECONDS)
    except RuntimeError as error:  # of torch, its compiler or a library, for example if memory runs out
        if settings.form == "grouped":
            raise
        warnings.warn(f"cannot compute convolutions as {settings.convolutions}: {error}", stacklevel=2)
        return 0.0
    finally:  # free the memory for training
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
