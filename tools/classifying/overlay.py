"""Draw a picture's best classes as bars below it, as in the paper's Fig. 4."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from tools.classifying.output import Prediction, short

BAR, FIRST_BAR = "#c9d7e8", "#8fb3dc"
ROW_PIXELS, MARGIN_PIXELS, DPI = 26, 8, 100
PERCENT_PIXELS = 64  # width of the column of probabilities, right of the bars
MIN_WIDTH, MAX_WIDTH = 320, 1280  # pixels


def reduced(image: Image.Image) -> Image.Image:
    """Resize a picture to a width within bounds and, for video codecs, to even sides."""
    width = min(max(image.width, MIN_WIDTH), MAX_WIDTH) // 2 * 2
    height = max(2, round(image.height * width / image.width / 2) * 2)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def with_bars(image: Image.Image, bars: Image.Image) -> Image.Image:
    """Return a picture with bars of the same width below it."""
    whole = Image.new("RGB", (image.width, image.height + bars.height))
    whole.paste(image)
    whole.paste(bars, (0, image.height))
    return whole


def draw_bars(predictions: Sequence[Prediction], width: int) -> Image.Image:
    """Draw a row for each class: a bar proportional to its probability, its name and the probability."""
    height = ROW_PIXELS * len(predictions) + 2 * MARGIN_PIXELS
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    of_bars = Bbox.from_extents(0, 0, width - MARGIN_PIXELS - PERCENT_PIXELS, height)
    room = width - 2 * MARGIN_PIXELS - PERCENT_PIXELS
    for row, prediction in enumerate(predictions):
        middle = MARGIN_PIXELS + (row + 0.5) * ROW_PIXELS
        axes.barh(
            middle,
            room * prediction.probability,
            height=ROW_PIXELS - 4,
            left=MARGIN_PIXELS,
            color=BAR if row else FIRST_BAR,
        )
        weight = "normal" if row else "bold"
        name = axes.text(MARGIN_PIXELS + 6, middle, short(prediction.name), weight=weight)
        name.set(clip_on=True, clip_box=of_bars)
        percent = axes.text(width - MARGIN_PIXELS - 4, middle, f"{prediction.probability:.1%}", ha="right")
        for text in (name, percent):
            text.set(va="center_baseline", size=10.5, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
