"""Write the best classes of a picture or of a window of a video as text, JSON lines or CSV."""

import csv
import json
from collections.abc import Callable
from typing import NamedTuple, TextIO

import numpy as np

from pipeline.printable import in_line
from pipeline.spec import NetSpec

COLUMNS = ("file", "start_seconds", "end_seconds", "frames", "rank", "class", "name", "probability")


class Prediction(NamedTuple):
    """A class and its probability (0 to 1)."""

    id: str
    name: str
    probability: float


class Window(NamedTuple):
    """A time window of a video whose frames were averaged."""

    start_seconds: float
    end_seconds: float
    frames: int


class Result(NamedTuple):
    """A file or window with its classes. top: the best classes, best first. window: None for a picture."""

    file: str
    top: list[Prediction]
    window: Window | None = None

    def __str__(self) -> str:
        when = f" {self.window.start_seconds:g}-{self.window.end_seconds:g} s" if self.window else ""
        predictions = (f"{short(name)} {probability:.1%}" for _, name, probability in self.top)
        return f"{in_line(self.file)}{when}: {', '.join(predictions)}"


def best(probabilities: np.ndarray, spec: NetSpec) -> list[Prediction]:
    """Return the five most probable classes of probabilities [classes], or all if there are fewer."""
    ranked = np.argsort(-probabilities, kind="stable")[:5]
    return [Prediction(spec.classes[n].id, spec.classes[n].name, float(probabilities[n])) for n in ranked]


def short(name: str) -> str:
    """Return the first of a class's names; ImageNet separates them by commas."""
    return name.partition(",")[0]


def json_lines(file: TextIO) -> Callable[[Result], None]:
    """Return a function that writes a result as a line of JSON."""

    def write(result: Result) -> None:
        window = result.window._asdict() if result.window else {}
        top = [{"class": g.id, "name": g.name, "probability": round(g.probability, 6)} for g in result.top]
        row = {"file": result.file, **window, "top": top}
        print(json.dumps(row, ensure_ascii=False), file=file, flush=True)

    return write


def csv_rows(file: TextIO) -> Callable[[Result], None]:
    """Write the header COLUMNS; return a function that writes a row for each prediction of a result."""
    writer = csv.writer(file)
    writer.writerow(COLUMNS)

    def write(result: Result) -> None:
        window = result.window or ("", "", "")
        for rank, (id_, name, probability) in enumerate(result.top, 1):
            writer.writerow([result.file, *window, rank, id_, name, f"{probability:.6f}"])
        file.flush()

    return write
