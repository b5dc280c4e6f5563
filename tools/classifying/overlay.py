"""Draw a picture's best classes as bars below it, as in the paper's Fig. 4."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from tools.classifying.output import Guess, short

BAR, FIRST_BAR = "#c9d7e8", "#8fb3dc"
ROW_PIXELS, MARGIN_PIXELS, DPI = 26, 8, 100
PERCENT_PIXELS = 64  # width of the column of probabilities, right of the bars
LEAST_WIDTH, MOST_WIDTH = 320, 1280  # pixels


def reduced(image: Image.Image) -> Image.Image:
    """Resize a picture to the width it is drawn at: within bounds and, for video codecs, with even sides."""
    width = min(max(image.width, LEAST_WIDTH), MOST_WIDTH) // 2 * 2
    height = max(2, round(image.height * width / image.width / 2) * 2)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def with_bars(image: Image.Image, bars: Image.Image) -> Image.Image:
    """Return a picture with bars of the same width below it."""
    whole = Image.new("RGB", (image.width, image.height + bars.height))
    whole.paste(image)
    whole.paste(bars, (0, image.height))
    return whole


def draw_bars(guesses: Sequence[Guess], width: int) -> Image.Image:
    """Draw a row for each class: a bar as long as its probability, its name and the probability."""
    height = ROW_PIXELS * len(guesses) + 2 * MARGIN_PIXELS
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    of_bars = Bbox.from_extents(0, 0, width - MARGIN_PIXELS - PERCENT_PIXELS, height)
    room = width - 2 * MARGIN_PIXELS - PERCENT_PIXELS
    for row, guess in enumerate(guesses):
        middle = MARGIN_PIXELS + (row + 0.5) * ROW_PIXELS
        axes.barh(
            middle,
            room * guess.probability,
            height=ROW_PIXELS - 4,
            left=MARGIN_PIXELS,
            color=BAR if row else FIRST_BAR,
        )
        name = axes.text(MARGIN_PIXELS + 6, middle, short(guess.name), weight="normal" if row else "bold")
        name.set(clip_on=True, clip_box=of_bars)
        percent = axes.text(width - MARGIN_PIXELS - 4, middle, f"{guess.probability:.1%}", ha="right")
        for text in (name, percent):
            text.set(va="center_baseline", size=10.5, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
