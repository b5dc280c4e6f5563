"""Write the folder of a run without training one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.manifest import Class
from pipeline.spec import NetSpec
from trainer.run import REPORT, Run
from trainer.setting_sources import read_recipe
from trainer.settings import validated


def write_run(
    folder: Path,
    errors: Sequence[float] = (),
    *,
    recipe: str = "demo",
    dataset: str = "fingerprint",
    classes: int = 10,
    rates: Sequence[float] = (100.0, 300.0, 200.0),
    is_finished: bool = False,
    begun: float = 1_000_000.0,
    **settings: Any,
) -> Path:
    """Write a run with an evaluation after each epoch and log intervals of 10 steps. Returns its folder.

    errors: the top-1 error of each evaluation. rates: images/s of each interval. begun: as a Unix time.
    """
    run = Run(folder)
    names = tuple(Class(id=f"n{label}", name=f"name {label}") for label in range(classes))
    spec = NetSpec(geometry="256", size=144, crop=112, mean=(120, 120, 120), classes=names)
    values = read_recipe(recipe) | {"recipe": recipe, "data": "shards", "out": str(folder)} | settings
    run.adopt(validated(values), spec, dataset)
    os.utime(folder / "net.json", (begun, begun))
    for number, rate in enumerate(rates, 1):
        row = {"step": 10 * number, "epoch": len(errors) * number / len(rates), "loss": 3.0 - number / 10}
        row |= {"error": 0.5, "learning_rate": 0.01, "images_per_second": rate, "wait_ratio": 0.0}
        run.metrics.append(row)
    for epoch, error in enumerate(errors, 1):
        row = {"step": 10 * epoch, "epoch": epoch, "top1_error": error, "top5_error": error / 2}
        run.evaluations.append(row | {"loss": 2 * error, "images": 100})
    if is_finished:
        (folder / REPORT).write_text("# report\n")
    return folder
