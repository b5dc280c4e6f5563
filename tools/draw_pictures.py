"""Draw a labelled set of pictures whose classes combine a shape and a colour.

    alexnet-train draw-pictures --out pictures

There are ten classes: five shapes, each in a warm and in a cold colour. Position, size and a small rotation
are random, and the background has blurred spots of both colours. Neither the colour nor the shape alone
determines the class, and no pixel is the same in all pictures.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import path_in_errors
from pipeline.output import secure
from tools.options import count, natural

SHAPES = ("disc", "square", "triangle", "cross", "ring")
HUES = {"warm": (-20, 45), "cold": (160, 250)}  # ranges in degrees
SIDE = 144  # pixels
_SCALE = 2  # pictures are drawn larger and then reduced, for smooth edges


def class_names() -> list[str]:
    return [f"{hue}_{shape}" for hue in HUES for shape in SHAPES]


def draw(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw one picture of a class: RGB, SIDE×SIDE."""
    hue, shape = name.split("_")
    canvas = _background(rng)
    radius = rng.uniform(0.26, 0.38) * canvas.width
    centre = rng.uniform(radius, canvas.width - radius, 2)
    _draw_shape(ImageDraw.Draw(canvas), shape, centre, radius, rng.uniform(-0.3, 0.3), _colour(hue, rng))
    canvas = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    noise = rng.normal(0, 8, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))


def _colour(hue: str, rng: np.random.Generator, strength: float = 1.0) -> tuple[int, ...]:
    degrees = rng.uniform(*HUES[hue]) % 360
    saturation, value = rng.uniform(0.63, 1.0) * strength, rng.uniform(0.5, 1.0)
    return ImageColor.getrgb(f"hsv({degrees}, {saturation:.0%}, {value:.0%})")


def _background(rng: np.random.Generator) -> Image.Image:
    side = SIDE * _SCALE
    tone = rng.uniform(60, 200) + rng.uniform(-25, 25, 3)
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in tone))
    pen = ImageDraw.Draw(canvas)
    for hue in rng.permutation([*HUES, *HUES]):
        x, y, radius = *rng.uniform(0, side, 2), rng.uniform(0.05, 0.15) * side
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(hue, rng, 0.4))
    return canvas.filter(ImageFilter.GaussianBlur(0.04 * side))


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, angle: float, colour
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(radius * 0.45))
    else:
        corners = {
            "triangle": [(1.15, k * 120) for k in range(3)],
            "square": [(1.15, 45 + k * 90) for k in range(4)],
            # Twelve corners: the ends of the arms, and where the arms meet.
            "cross": [(r, a + k * 90) for k in range(4) for r, a in ((1.15, -17), (1.15, 17), (0.47, 45))],
        }[shape]
        points = [(r * radius, math.radians(degrees) + angle) for r, degrees in corners]
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in points], fill=colour)


def draw_all(root: Path, counts: dict[str, int], seed: int) -> None:
    """Draw a dataset. counts: number of pictures of each class, by split. Raises OSError."""
    for number, (split, pictures) in enumerate(counts.items()):
        for label, name in enumerate(class_names()):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for picture in range(pictures):
                rng = np.random.default_rng((seed, number, label, picture))
                draw(name, rng).save(folder / f"{name}_{picture:05d}.JPEG", quality=90)


def main() -> None:
    secure()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to draw the pictures into"
    )
    parser.add_argument(
        "--train", type=count, default=300, metavar="N", help="training pictures of each class (default 300)"
    )
    parser.add_argument(
        "--val", type=count, default=50, metavar="N", help="validation pictures of each class (default 50)"
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="seed of the pictures (default 0)",
    )
    options = parser.parse_args()
    try:
        out = options.out.absolute()
        with path_in_errors(options.out):
            counts = {"train": options.train, "val": options.val}
            if out.exists():
                draw_all(out, counts, options.seed)
            else:  # it appears when it is complete
                partial = out.with_name(f".{out.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                draw_all(partial, counts, options.seed)
                partial.rename(out)
    except OSError as error:
        sys.exit(f"draw-pictures: {error.filename}: {error.strerror}")
    classes = len(class_names())
    print(
        f"{classes * (options.train + options.val):,} pictures in {classes} classes written to {options.out}"
    )


if __name__ == "__main__":
    main()
