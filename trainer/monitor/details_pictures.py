"""Draw the details of an evaluation: confused classes, the confusion matrix and confident mistakes."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipeline.files import path_in_errors
from pipeline.manifest import Class, DatasetError
from pipeline.reader import OutageError, ShardReader
from trainer.details import Details
from trainer.monitor.drawn_names import drawn_names

MATRIX_CLASSES = 30  # the most classes for which the matrix is readable
_PAIRS = 30  # the most pairs of classes that are drawn
_TILE, _GAP, _CAPTION, _COLUMNS = 144, 12, 64, 8  # pixels, and tiles in a row
_LINE = 22  # letters below a tile
_DPI = 110
_LTR = "\u200e"  # keeps the order of names that are written from right to left
_TRUE, _WRONG = "#1a1a1a", "#b3261e"


def draw_pairs(path: Path, details: Details, classes: Sequence[Class]) -> None:
    """Draw the most frequent pairs of a class and a wrong prediction as bars. Raises OSError."""
    names, pairs = drawn_names(classes, 32), details.worst_pairs()[:_PAIRS]
    images = {each.label: each.images for each in details.by_class(len(classes))}
    figure, axes = plt.subplots(figsize=(9, 1.1 + 0.25 * len(pairs)), layout="constrained")
    bars = axes.barh(range(len(pairs)), [count for *_, count in pairs], color="#8fb3dc")
    shares = [f"{count:,} of {images[label]:,}" for label, _, count in pairs]
    axes.bar_label(bars, shares, padding=4, fontsize=8)
    captions = [f"{_LTR}{names[label]}{_LTR} → {names[predicted]}" for label, predicted, _ in pairs]
    axes.set_yticks(range(len(pairs)), captions, fontsize=8, parse_math=False)
    axes.set(xlabel="images of the first class that were taken for the second", ylim=(len(pairs) - 0.4, -0.6))
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_matrix(path: Path, details: Details, classes: Sequence[Class]) -> None:
    """Draw the confusion matrix of at most MATRIX_CLASSES classes. Raises OSError."""
    count = len(classes)
    shares = np.zeros((count, count))
    of_class = details.by_class(count)
    for (label, predicted), images in details.pairs.items():
        shares[label, predicted] = images / of_class[label].images
    side = 2.6 + max(0.42, 2 / count) * count  # inches
    figure, axes = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (label, predicted), images in details.pairs.items():
        colour = "white" if shares[label, predicted] > 0.5 else "black"
        text = f"{images}" if images < 10_000 else f"{images / 1000:.0f}k"
        axes.text(predicted, label, text, ha="center", va="center", color=colour, fontsize=7)
    names = drawn_names(classes, 24)
    axes.set_xticks(range(count), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="class")
    figure.colorbar(shown, ax=axes, label="share of the class's images", shrink=0.6)
    _save(figure, path)


def draw_mistakes(path: Path, details: Details, classes: Sequence[Class], reader: ShardReader) -> None:
    """Draw a contact sheet of the most confident mistakes, with the images as they are stored.

    The predicted class and its probability are red, the true class is black. reader: that of the split.
    Raises OSError, and OutageError if the storage fails; an image that cannot be read is left grey.
    """
    names, mistakes = drawn_names(classes, 44), details.mistakes
    columns = min(_COLUMNS, len(mistakes))
    width, height = _TILE + _GAP, _TILE + _GAP + _CAPTION
    sheet = Image.new("RGB", (columns * width, -(-len(mistakes) // columns) * height), "white")
    figure = plt.figure(figsize=(sheet.width / _DPI, sheet.height / _DPI))
    for index, mistake in enumerate(mistakes):
        row, column = divmod(index, columns)
        tile = _tile(reader, mistake.sample)
        left, top = column * width + (width - tile.width) // 2, row * height + _GAP + (_TILE - tile.height)
        sheet.paste(tile, (left, top))
        predicted = [f"{mistake.probability:.1%}", *wrap(names[mistake.predicted], _LINE)]
        true = wrap(names[mistake.label], _LINE)
        for number, line in enumerate([*predicted, *true]):
            colour = _WRONG if number < len(predicted) else _TRUE
            x, y = (column + 0.5) * width, row * height + _GAP + _TILE + 3 + 12 * number
            place = x / sheet.width, 1 - y / sheet.height
            figure.text(*place, line, fontsize=6.5, color=colour, ha="center", va="top", parse_math=False)
    figure.figimage(np.asarray(sheet))
    _save(figure, path)


def _tile(reader: ShardReader, sample: int) -> Image.Image:
    try:
        image: Image.Image = Image.open(BytesIO(reader.jpeg(sample)))
        image.draft("RGB", (_TILE, _TILE))  # decodes a large image at a fraction of its size
        image = image.convert("RGB")
    except OutageError:
        raise
    except (DatasetError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # damaged
        return Image.new("RGB", (_TILE, _TILE), "lightgrey")
    image.thumbnail((_TILE, _TILE))
    return image


def _save(figure: Figure, path: Path) -> None:
    with path_in_errors(path):
        figure.savefig(path, dpi=_DPI)
    plt.close(figure)
