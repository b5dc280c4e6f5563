"""Draw Fig. 4: classified pictures with bars, and rows of similar pictures."""

import re
import textwrap
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # writes files without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from PIL import Image

from pipeline.manifest import DatasetError
from pipeline.reader import ShardReader

SIDE = 256  # maximum length of a picture's sides, in pixels
COLUMNS = 4  # classified pictures per row
BAR_LETTERS = 26  # letters of the usual size that fit above a bar; the letters of longer names are smaller
RIGHT, WRONG = "#f4a3a3", "#a9c7ea"  # bars of the picture's own class and of others
CAPTION = (
    "Left: validation images with their class and index, and the classes that the net finds most probable; "
    "the correct class is red. Right: validation images in the first column, and beside each the training "
    "images whose activations of the last hidden layer are nearest in L2, nearest first, with their index "
    "and distance; a red frame marks a different class. If only some classes are shown, the nearest are "
    "those among their training images."
)


class Picture(NamedTuple):
    """A sample. number: its index in the split. label, name: its class."""

    number: int
    label: int
    name: str
    image: Image.Image


class Classified(NamedTuple):
    """A classified picture. top: label, name and probability (0 to 1) of its best classes, best first."""

    picture: Picture
    top: list[tuple[int, str, float]]


class Retrieved(NamedTuple):
    """A query with its neighbours. nearest: training pictures and distances, nearest first."""

    query: Picture
    nearest: list[tuple[Picture, float]]


def thumbnail(reader: ShardReader, number: int) -> Image.Image:
    """Return a sample reduced to at most SIDE px. Raises DatasetError if it cannot be decoded."""
    try:
        with Image.open(BytesIO(reader.jpeg(number))) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError):
        raise DatasetError(
            f"the sample in {reader.location(number)} cannot be decoded: copy the shard again"
        ) from None
    image.thumbnail((SIDE, SIDE))
    return image


def draw(path: Path, classified: list[Classified], retrieved: list[Retrieved]) -> None:
    """Draw both panels side by side."""
    figure = plt.figure(figsize=(15, 8.4), layout="constrained")
    panels = figure.subfigures(1, 2, squeeze=False, wspace=0.04, width_ratios=(1, 1.15))[0]
    _draw_classified(panels[0], classified)
    _draw_retrieved(panels[1], retrieved)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_classified(panel: SubFigure, classified: list[Classified]) -> None:
    rows = -(-len(classified) // COLUMNS)
    axes = panel.subplots(2 * rows, COLUMNS, squeeze=False, height_ratios=(1.3, 1) * rows)
    for position in range(rows * COLUMNS):
        row, column = divmod(position, COLUMNS)
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        above.set_axis_off()
        below.set_axis_off()
        if position < len(classified):
            _draw_one(above, below, classified[position])


def _draw_one(above: Axes, below: Axes, shown: Classified) -> None:
    above.imshow(shown.picture.image)
    above.set_anchor("S")  # next to its bars
    above.set_title(
        f"{wrapped(shown.picture.name, 24)}\nval {shown.picture.number:,}", fontsize=9, parse_math=False
    )
    draw_bars(below, shown)


def draw_bars(axes: Axes, shown: Classified) -> None:
    """Draw the classes of a picture as bars, with each name above its bar and the probability beside it."""
    for position, (label, name, probability) in enumerate(shown.top):
        axes.barh(position, probability, 0.36, color=RIGHT if label == shown.picture.label else WRONG)
        text = short(name)
        size = 8 * min(1, BAR_LETTERS / len(text))
        axes.text(0, position - 0.24, text, fontsize=size, va="bottom", parse_math=False)
        x, side = (probability + 0.02, "left") if probability < 0.75 else (0.98, "right")
        axes.text(x, position, f"{probability:.1%}", fontsize=7.5, va="center", ha=side)
    axes.set(xlim=(0, 1), ylim=(len(shown.top) - 0.7, -0.9))


def _draw_retrieved(panel: SubFigure, retrieved: list[Retrieved]) -> None:
    columns = 1 + max(len(shown.nearest) for shown in retrieved)
    axes = panel.subplots(len(retrieved), columns, squeeze=False, width_ratios=(1.25, *(1,) * (columns - 1)))
    for row, shown in zip(axes, retrieved, strict=True):
        nearest = [(picture, f"{picture.number:,} at {distance:.1f}") for picture, distance in shown.nearest]
        cells = [(shown.query, f"val {shown.query.number:,}"), *nearest]
        for axis, (picture, where) in zip(row, cells, strict=False):
            axis.imshow(picture.image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(
                color="#d02020" if picture.label != shown.query.label else "none", linewidth=2.5
            )
            axis.set_title(f"{wrapped(picture.name, 18)}\n{where}", fontsize=7, parse_math=False)


def wrapped(name: str, width: int) -> str:
    """Return the first of a class's names in lines of up to `width` letters."""
    return "\n".join(textwrap.wrap(short(name), width))


def short(name: str) -> str:
    """Return the first of a class's names, without the others that follow a comma or are in brackets."""
    return " ".join(re.split(r"[,(\[]", name)[0].split()) or name
