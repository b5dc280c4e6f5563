"""Choose the form of a run's convolutions (model/forms.py): the fastest on the machine where it begins.

Forms differ in rounding, so a run keeps its form; otherwise it could not be continued bit for bit. On a GPU,
the forms are measured when a run begins, and the best is remembered for other runs with the same work. On a
CPU, the answer is known: nothing is faster than groups in bf16, or in the net of the paper's text, whose
towers are joined for each normalisation.
"""

import gc
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter

from model.alexnet import Variant
from model.forms import GROUPS
from trainer.build import build_decoding
from trainer.monitor.ceilings import model_work, rate
from trainer.processes.distributed import World
from trainer.run import Run, environment
from trainer.setting_groups import Form
from trainer.settings import Settings
from trainer.tuning import remembered

SECONDS = 1.0  # of measuring each form, after its first steps
CLASSES = 1000  # of the net that is measured; fc8 is a small part of it
_NET = ("preset", "dropout", "crop", "compile", *(field.name for field in fields(Variant)))


def settle_form(settings: Settings, run: Run, world: World) -> tuple[Settings, list[str]]:
    """Resolve the form of the convolutions. Returns the settings with it, and notes for the log.

    The first process decides for all. settings: with the precision already resolved. Raises as
    `Run.recorded_settings` does.
    """
    notes: list[str] = []

    def choose() -> str:
        form, found_notes = fastest_form(settings, world)
        notes.extend(found_notes)
        return form

    form = run.keep_form(choose) if world.is_main else ""
    form, notes = world.share((form, notes))
    return settings.model_copy(update={"convolutions": form}), notes


def fastest_form(settings: Settings, world: World) -> tuple[str, list[str]]:
    """Return the form that the settings name, or else the fastest one here, and notes for the log."""
    if settings.convolutions != "auto":
        return settings.convolutions, []
    if settings.preset == "torchvision":
        return "grouped", []
    if world.device.type == "cpu":  # as measured in docs/benchmarks.md
        return "towers" if (settings.preset, settings.precision) == ("code2012", "fp32") else "grouped", []

    def images_per_second(form: str) -> float:
        return measure(settings.model_copy(update={"convolutions": form}), world)

    def find() -> dict[Literal["form"], Form]:
        groups = GROUPS if settings.towers == 2 else GROUPS[:1]
        return {"form": fastest(groups, images_per_second)}  # type: ignore[dict-item]

    about = environment(world.device_name)
    machine = [about["device"], about["torch"], torch.backends.cudnn.version()]
    net = {name: getattr(settings, name) for name in _NET}
    key = json.dumps([machine, net, settings.batch // world.size, settings.precision])
    structure = TypeAdapter(Annotated[dict[Literal["form"], Form], Field(min_length=1)])
    found, notes = remembered("convolutions.json", key, structure, find, world.is_main)
    return found["form"], [f"computing convolutions as {found['form']}, the fastest form here", *notes]


def fastest(groups: Iterable[str], images_per_second: Callable[[str], float]) -> str:
    """Find the fastest form of the groups with conv1 unchanged, then the faster form of conv1 with it."""
    measured = cache(images_per_second)
    best = max(groups, key=measured)
    return max((best, f"{best}-s2d"), key=measured)


def measure(settings: Settings, world: World) -> float:
    """Measure the images/s of this process's steps, without the exchange of gradients.

    Returns 0 for a form that fails here. Raises RuntimeError if `grouped` fails, since nothing can then be
    trained here.
    """
    try:
        return _images_per_second(settings, world)
    except RuntimeError as error:  # from memory, the compiler or a library
        if settings.form == "grouped":
            raise
        warnings.warn(f"cannot compute convolutions as {settings.convolutions}: {error}", stacklevel=2)
        return 0.0
    finally:  # free the memory for training
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _images_per_second(settings: Settings, world: World) -> float:
    images = settings.batch // world.size
    decoding = build_decoding(settings, world.device)
    work = model_work(settings, CLASSES, decoding, images, settings.precision)
    for _ in range(3):  # compile it, and let cuDNN find the fastest algorithms
        work()
    return rate(work, SECONDS, world.device)
