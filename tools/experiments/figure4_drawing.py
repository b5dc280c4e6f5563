"""Draw Fig. 4 as a PNG and an HTML page: pictures with bars, and rows of similar pictures."""

from base64 import b64encode
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: there may be no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from PIL import Image

from pipeline.manifest import DatasetError
from pipeline.reader import ShardReader

SIDE = 256  # most pixels of a picture's side on the page
COLUMNS = 4  # classified pictures per row
RIGHT, WRONG = "#f4a3a3", "#a9c7ea"  # bars of the picture's own class and of others
CAPTION = (
    "Left: validation images, their class, and the most probable classes by the net, the right one in red. "
    "Right: validation images in the first column, and the training images whose last hidden activations "
    "are nearest in L2, the nearest first; framed in red where the class is another."
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
    figure = plt.figure(figsize=(15, 7.2), layout="constrained")
    panels = figure.subfigures(1, 2, squeeze=False, wspace=0.04, width_ratios=(1, 1.15))[0]
    _draw_classified(panels[0], classified)
    _draw_retrieved(panels[1], retrieved)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_classified(panel: SubFigure, classified: list[Classified]) -> None:
    rows = -(-len(classified) // COLUMNS)
    axes = panel.subplots(2 * rows, COLUMNS, squeeze=False, height_ratios=(1.6, 1) * rows)
    for place in range(rows * COLUMNS):
        row, column = divmod(place, COLUMNS)
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        above.set_axis_off()
        below.set_axis_off()
        if place < len(classified):
            _draw_one(above, below, classified[place])


def _draw_one(above: Axes, below: Axes, shown: Classified) -> None:
    above.imshow(shown.picture.image)
    above.set_anchor("S")  # next to its bars
    above.set_title(short(shown.picture.name), fontsize=10, parse_math=False)
    for place, (label, name, probability) in enumerate(shown.top):
        below.barh(place, probability, color=RIGHT if label == shown.picture.label else WRONG)
        below.text(0.02, place, short(name), fontsize=8.5, va="center", parse_math=False)
    below.set(xlim=(0, 1), ylim=(len(shown.top) - 0.4, -0.6))


def _draw_retrieved(panel: SubFigure, retrieved: list[Retrieved]) -> None:
    columns = 1 + max(len(shown.nearest) for shown in retrieved)
    axes = panel.subplots(len(retrieved), columns, squeeze=False, width_ratios=(1.25, *(1,) * (columns - 1)))
    for row, shown in zip(axes, retrieved, strict=True):
        for place, picture in enumerate((shown.query, *(near for near, _ in shown.nearest))):
            row[place].imshow(picture.image)
            row[place].set(xticks=[], yticks=[])
            row[place].spines[:].set(
                color="#d02020" if picture.label != shown.query.label else "none", linewidth=2.5
            )
            row[place].set_title(short(picture.name, 16), fontsize=7.5, parse_math=False)


def short(name: str, length: int = 24) -> str:
    """Return the first of a class's names, shortened to `length` characters."""
    name = " ".join(name.partition(",")[0].split())
    return name if len(name) <= length else f"{name[: length - 1]}…"


def write_page(path: Path, classified: list[Classified], retrieved: list[Retrieved]) -> None:
    """Write a self-contained page that embeds its pictures."""
    cards = "\n".join(map(_card, classified))
    rows = "\n".join(map(_row, retrieved))
    path.write_text(_PAGE.format(cards=cards, rows=rows), encoding="utf-8")


def _card(shown: Classified) -> str:
    bars = "".join(
        f'<li class="{"right" if label == shown.picture.label else "wrong"}" '
        f'style="--share: {probability:.4f}">'
        f"<span>{escape(name)}</span><b>{probability:.1%}</b></li>"
        for label, name, probability in shown.top
    )
    return f"<figure>{_image(shown.picture)}{_text(shown.picture, 'val')}<ol>{bars}</ol></figure>"


def _row(shown: Retrieved) -> str:
    near = "".join(
        f'<figure class="{"same" if picture.label == shown.query.label else "other"}">{_image(picture)}'
        f"{_text(picture, f'distance {distance:.2f}, train')}</figure>"
        for picture, distance in shown.nearest
    )
    return f"<div><figure>{_image(shown.query)}{_text(shown.query, 'val')}</figure>{near}</div>"


def _image(picture: Picture) -> str:
    buffer = BytesIO()
    picture.image.save(buffer, "JPEG", quality=90)
    data = b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(picture.name)}">'


def _text(picture: Picture, where: str) -> str:
    return f"<figcaption>{escape(picture.name)}<small>{where} {picture.number:,}</small></figcaption>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fig. 4: what the net sees</title>
<style>
  :root {{ color-scheme: light dark; --right: light-dark(#f4a3a3, #8f3232);
    --wrong: light-dark(#c3d7ee, #2f4f74); --other: light-dark(#d02020, #ff6b6b) }}
  body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
  h2 {{ margin-top: 2.5rem }}
  figure {{ margin: 0 }}
  img {{ width: 100%; aspect-ratio: 1; object-fit: cover; display: block; border-radius: 4px }}
  figcaption {{ margin-top: .3rem; overflow-wrap: anywhere }}
  small {{ display: block; opacity: .65 }}
  .cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1.6rem }}
  ol {{ list-style: none; margin: .5rem 0 0; padding: 0; font-size: 13px }}
  li {{ display: flex; justify-content: space-between; gap: .5rem; margin: 2px 0; padding: 1px 6px;
    border-radius: 3px }}
  li b {{ font-weight: normal; font-variant-numeric: tabular-nums }}
  li {{ background: linear-gradient(to right, var(--bar) calc(100% * var(--share)), transparent 0) }}
  .right {{ --bar: var(--right) }}
  .wrong {{ --bar: var(--wrong) }}
  .rows {{ overflow-x: auto }}
  .rows > div {{ display: grid; grid-template-columns: repeat(7, minmax(95px, 1fr)); gap: .6rem;
    margin-bottom: 1.2rem; font-size: 13px }}
  .rows figure:first-child {{ padding-right: .8rem; border-right: 1px solid light-dark(#ccc, #555) }}
  .other img {{ outline: 3px solid var(--other); outline-offset: -3px }}
</style>
<h1>Fig. 4: what the net sees</h1>
<h2>The most probable classes</h2>
<p>Validation images with their class, and the net's most probable classes; the right class is red.</p>
<div class="cards">
{cards}
</div>
<h2>The nearest training images</h2>
<p>Validation images on the left; next to each, the training images whose 4096 activations of the last
hidden layer are nearest in L2, nearest first; a red frame marks another class.</p>
<div class="rows">
{rows}
</div>
</html>
"""
