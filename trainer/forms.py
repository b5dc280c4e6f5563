"""In which form a run computes the net's convolutions (model/forms.py): what is fastest where it begins.

Forms differ in rounding, so a run keeps its own, or it would not be continued bit for bit. On a GPU they are
measured when a run begins, and the best is remembered for others of the same work. On a CPU it is known: in
bf16, and in the text's net, whose towers are joined for each normalisation, nothing gains on groups.
"""

import gc
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache

import torch

from model.alexnet import Variant
from model.forms import GROUPS
from trainer.build import build_decoding
from trainer.monitor.ceilings import model_work, rate
from trainer.processes.distributed import World
from trainer.run import Run, environment
from trainer.settings import Settings
from trainer.tuning import remembered

SECONDS = 1.0  # for which each is measured, after its first steps
CLASSES = 1000  # of the net that is measured: fc8 is a small part of it
_NET = ("preset", "dropout", "crop", "compile", *(field.name for field in fields(Variant)))


def settle_form(settings: Settings, run: Run, world: World) -> tuple[Settings, list[str]]:
    """The settings with the run's form, and what there is to say of it. The first process decides, so that
    all have the same.

    settings: with the precision resolved. Raises as `Run.recorded_settings` does.
    """
    notes: list[str] = []

    def choose() -> str:
        form, said = fastest_form(settings, world)
        notes.extend(said)
        return form

    form = run.keep_form(choose) if world.is_main else ""
    form, notes = world.share((form, notes))
    return settings.model_copy(update={"convolutions": form}), notes


def fastest_form(settings: Settings, world: World) -> tuple[str, list[str]]:
    """The form that the settings name, else what is fastest here; and what there is to say of it."""
    if settings.convolutions != "auto":
        return settings.convolutions, []
    if settings.preset == "torchvision":
        return "grouped", []
    if world.device.type == "cpu":  # as measured in docs/benchmarks.md
        return "towers" if (settings.preset, settings.precision) == ("code2012", "fp32") else "grouped", []

    def images_per_second(form: str) -> float:
        return measure(settings.model_copy(update={"convolutions": form}), world)

    def find() -> dict[str, str]:
        groups = GROUPS if settings.towers == 2 else GROUPS[:1]
        return {"form": fastest(groups, images_per_second)}

    about = environment(world.device_name)
    machine = [about["device"], about["torch"], torch.backends.cudnn.version()]
    net = {name: getattr(settings, name) for name in _NET}
    key = json.dumps([machine, net, settings.batch // world.size, settings.precision])
    found, notes = remembered("convolutions.json", key, find, world.is_main)
    return found["form"], [f"convolutions are computed as {found['form']}, which is fastest here", *notes]


def fastest(groups: Iterable[str], images_per_second: Callable[[str], float]) -> str:
    """The best form of groups with conv1 as it is, then the better of conv1's two with it."""
    measured = cache(images_per_second)
    best = max(groups, key=measured)
    return max((best, f"{best}-s2d"), key=measured)


def measure(settings: Settings, world: World) -> float:
    """Images/s of this process's steps, without the exchange of gradients; 0 of another form than `grouped`
    that fails here. Raises RuntimeError where that one fails: then nothing trains here."""
    try:
        return _images_per_second(settings, world)
    except RuntimeError as error:  # of memory, of the compiler or of a library
        if settings.form == "grouped":
            raise
        warnings.warn(f"convolutions are not computed as {settings.convolutions}: {error}", stacklevel=2)
        return 0.0
    finally:  # the memory is for training
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _images_per_second(settings: Settings, world: World) -> float:
    images = settings.batch // world.size
    decoding = build_decoding(settings, world.device)
    work = model_work(settings, CLASSES, decoding, images, settings.precision)
    for _ in range(3):  # to compile it, and to find the fastest algorithms
        work()
    return rate(work, SECONDS, world.device)
