"""Start the measurement of `alexnet-train doctor` in a temporary run, on the dataset or on drawn pictures."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.files import close_quietly
from pipeline.mixture import read_data
from pipeline.packing.options import PackingOptions
from pipeline.packing.pack import pack
from tools.diagnosing.findings import run_program
from tools.diagnosing.forecast import Calibration
from tools.draw_pictures import class_names, draw_all
from trainer.initial import with_initial_net
from trainer.run import Run, RunError
from trainer.setting_sources import load_settings

DRAWN_SIZE = 256  # pixels
_DRAWN = {"train": 300, "val": 100}  # pictures
_LIMIT_SECONDS, _LIMIT_FACTOR = 900.0, 10.0  # of the measurement, besides and as a multiple of its seconds
_KILLED = -signal.SIGKILL, 128 + signal.SIGKILL  # the process itself, or one of several


def rehearse(arguments: Sequence[str], parent: Path, seconds: float, drawn: bool) -> tuple[Calibration, int]:
    """Measure the beginning of the run that the arguments describe, in a folder that is deleted afterwards.

    parent: where to make that folder, on the disk of the run folder. seconds: how long to measure. drawn:
    whether to draw and pack pictures and train on them instead. Returns what was measured, and the number of
    validation images. Raises RunError if the measurement fails, and OSError.
    """
    begun = time.monotonic()
    with TemporaryDirectory(prefix=".alexnet-doctor-", dir=parent) as name:
        folder = Path(name)
        command_line = [*arguments, "--out", str(folder / "run"), "--port", "0"]
        if drawn:
            command_line += ["--data", str(_draw(folder, load_settings(command_line).crop))]
            begun = time.monotonic()
        settings = with_initial_net(load_settings(command_line))
        manifest, result = read_data(settings.data), folder / "calibration.json"
        close_quietly(Run(settings.run_folder).begin(settings, manifest))
        ended = run_program(
            [
                *(sys.executable, "-m", f"{__package__}.calibration"),
                *(str(result), str(begun), str(seconds), *command_line),
            ],
            _LIMIT_SECONDS + _LIMIT_FACTOR * seconds,
        )
        if ended.code == 0:
            return Calibration(**json.loads(result.read_text())), manifest.split("val").samples
    raise RunError(_reason(ended.code, ended.errors))


def _draw(folder: Path, crop: int) -> Path:
    """Draw pictures and pack them, large enough for the crop. Returns the folder of the dataset."""
    classes = len(class_names())
    draw_all(folder / "pictures", {split: count // classes for split, count in _DRAWN.items()}, seed=0)
    options = PackingOptions(
        str(folder / "pictures"), str(folder / "shards"), size=max(DRAWN_SIZE, crop), workers=1
    )
    pack(options)
    return folder / "shards"


def _reason(code: int | None, errors: str) -> str:
    """Return why the measurement ended, given its exit code, or None, and its standard error."""
    if code is None:
        return "the first steps did not end in time: see whether the GPU and the storage answer"
    if code in _KILLED:
        return "killed, as the system does if memory runs out: use a smaller --batch, or allow more memory"
    lines = errors.strip().splitlines()
    if code < 0:
        lines.append(f"it was ended by {signal.Signals(-code).name}")
    return lines[-1] if lines else f"it ended with exit code {code}"
