"""The figures of the report that tools/inspect_shards.py writes."""

import warnings
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files without a display
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from tools.inspecting.remote import Reader

TILES = 100  # maximum on the contact sheet
TILE = 128  # pixels
_CAPTION = 20  # pixels below a tile
_GAP = 6  # pixels
_NAMED = 40  # maximum number of classes drawn as bars with names; more are drawn as a curve
_DPI = 100


def draw_classes(path: Path, names: list[str], counts: dict[str, np.ndarray]) -> None:
    """Draw the samples per class, one panel per split.

    They are bars in the order of the first split or, if there are more than _NAMED classes, a falling curve.
    """
    order = np.argsort(-next(iter(counts.values())), kind="stable")
    named = len(names) <= _NAMED
    size = (9, 1.2 + 0.22 * len(names) if named else 3.6)  # inches
    figure, panels = plt.subplots(
        1, len(counts), figsize=size, layout="constrained", squeeze=False, sharey=named
    )
    for panel, (split, values) in zip(panels[0], counts.items(), strict=True):
        panel.set_title(split)
        panel.grid(alpha=0.3, axis="x" if named else "y")
        if named:
            panel.barh(range(len(names)), values[order])
            panel.set(xlabel="samples", ylim=(len(names) - 0.4, -0.6))
            captions = [_short(names[label], 28) for label in order]
            panel.set_yticks(range(len(names)), captions, parse_math=False)
        else:
            panel.step(range(len(names)), -np.sort(-values), where="mid")
            panel.set(xlabel="classes by samples", ylabel="samples", ylim=(0, None))
    _save(figure, path)


def draw_sizes(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Draw histograms of the JPEGs' bytes, width and height, as percentages of each split."""
    titles = {"size": "bytes of a JPEG", "width": "width in px", "height": "height in px"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        low = min(int(part[column].min()) for part in rows.values())
        high = max(int(part[column].max()) for part in rows.values())
        wide = high > 4 * low  # on a linear scale, almost all samples would fall into a few bins
        edges = np.geomspace(low, high, 41) if wide else np.linspace(low - 0.5, high + 0.5, 41)
        for split, part in rows.items():
            shares = np.histogram(part[column], edges)[0] / len(part)
            panel.stairs(100 * shares, edges, label=split, fill=True, alpha=0.5)
        panel.set(xlabel=title, ylabel="% of the split")
        if wide:
            panel.set_xscale("log")
            ticks = [step * 10**power for power in range(10) for step in (1, 2, 5)]
            ticks = [tick for tick in ticks if low <= tick <= high]
            panel.set_xticks(ticks[:: -(-len(ticks) // 4)])
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.xaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    panels[0].legend()
    _save(figure, path)


def draw_samples(path: Path, names: list[str], reader: Reader, seed: int) -> None:
    """Draw a contact sheet of randomly chosen samples: as many per class as fit, at most ten.

    If there are more classes than TILES, it shows one sample of each of TILES random classes.
    """
    labels = reader.rows["label"]
    rng = np.random.default_rng(seed)
    each = max(1, min(10, TILES // len(names)))
    columns = each * (10 // each)
    shown = np.sort(rng.permutation(np.unique(labels))[: TILES // each])
    width, height = TILE + _GAP, TILE + _GAP + _CAPTION
    sheet = Image.new("RGB", (columns * width, -(-len(shown) * each // columns) * height), "white")
    figure = plt.figure(figsize=(sheet.width / _DPI, sheet.height / _DPI))
    for block, label in enumerate(shown):
        numbers = rng.permutation(np.flatnonzero(labels == label))[:each]
        for index, number in enumerate(numbers, block * each):
            row, column = divmod(index, columns)
            tile = _tile(reader.jpeg(number).tobytes())
            left, top = column * width + (width - tile.width) // 2, row * height + (TILE - tile.height) // 2
            sheet.paste(tile, (left, top))
            x, y = (column + 0.5) * width, row * height + TILE + 2
            caption = f"{label} {_short(names[label], 17)}"
            figure.text(
                x / sheet.width,
                1 - y / sheet.height,
                caption,
                fontsize=7,
                ha="center",
                va="top",
                parse_math=False,
            )
    figure.figimage(np.asarray(sheet))
    _save(figure, path)


def _tile(jpeg: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(jpeg)).convert("RGB")
    except Exception:  # damaged: `alexnet-train verify-shards` says how
        return Image.new("RGB", (TILE, TILE), "red")
    image.thumbnail((TILE, TILE))
    return image


def _short(name: str, length: int) -> str:
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _save(figure: plt.Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for letters in names that the font lacks
        figure.savefig(path, dpi=_DPI)
    plt.close(figure)
