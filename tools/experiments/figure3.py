"""Repeat Fig. 3: draw the kernels of the first layer, grouped by tower.

    alexnet-train paper figure3 runs/a

The first tower's kernels are on top and the second's below, 16 in a row, as in the paper. Each kernel is
scaled by its own largest weight, which is drawn at full contrast; 0 is gray. The colour share of a kernel is
the share of its energy (the sum of its squared weights) that is lost when it is converted to gray: 0 % for a
kernel that ignores colour, 67 % for independent weights.
"""

import argparse

import numpy as np
from PIL import Image

from tools.experiments import finished
from tools.experiments.record import Figure, Record, Row

TAKES_SETTINGS = False
COLUMNS = 16
SCALE = 4  # pixels of the picture per weight
GAP = 4  # pixels between kernels
TOWER_GAP = 16  # pixels between towers
COLOUR = "mean colour share of a kernel's energy (%)"
COLOURFUL = "kernels with a colour share above 33 % (%)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Draw figure3.png. Raises what `open_run` raises."""
    opened = finished.open_run(options)
    model = opened.trained.model
    towers = by_tower(model.conv1.weight.detach().float().cpu().numpy(), model.variant.towers)
    draw(towers).save(options.out / "figure3.png")
    rows = []
    for number, kernels in enumerate(towers, 1):
        shares = 100 * colour_shares(kernels)
        rows.append(
            Row(
                system=f"tower {number}, {len(kernels)} kernels",
                measured={COLOUR: [shares.mean()], COLOURFUL: [100 * (shares > 100 / 3).mean()]},
            )
        )
    return Record(
        experiment="figure3",
        title="Fig. 3: the kernels of the first layer",
        source="Fig. 3 and section 6.1: one tower's kernels are largely colour-agnostic, the other's largely "
        "colour-specific, in every run",
        rows=rows,
        remarks=[
            "The independent weights with which training begins have a colour share of 67 %. After few "
            "epochs, part of that remains in these numbers."
        ],
        figures=[Figure(file="figure3.png", caption=_caption(len(towers)))],
        **opened.about(),
    )


def _caption(towers: int) -> str:
    order = ", the first tower's above and the second's below" if towers == 2 else ""
    return f"The kernels of 11×11×3 weights{order}. Each kernel is stretched to its own contrast."


def by_tower(weights: np.ndarray, towers: int) -> np.ndarray:
    """Reshape [kernels,3,11,11] to [towers,n,11,11,3]; each group of conv2 reads one tower's maps."""
    return weights.reshape(towers, -1, *weights.shape[1:]).transpose(0, 1, 3, 4, 2)


def draw(towers: np.ndarray) -> Image.Image:
    """Draw the kernels [towers,n,h,w,3] on white, COLUMNS in a row."""
    count, kernels, side = towers.shape[:3]
    cell = side * SCALE + GAP
    rows = -(-kernels // COLUMNS)
    height = rows * cell - GAP + TOWER_GAP  # of a tower, with the gap to the next
    sheet = np.full((count * height - TOWER_GAP, COLUMNS * cell - GAP, 3), 255, np.uint8)
    for tower in range(count):
        for number, kernel in enumerate(towers[tower]):
            row, column = divmod(number, COLUMNS)
            top, left = tower * height + row * cell, column * cell
            pixels = contrast(kernel).repeat(SCALE, 0).repeat(SCALE, 1)
            sheet[top : top + len(pixels), left : left + len(pixels)] = pixels
    return Image.fromarray(sheet)


def contrast(kernel: np.ndarray) -> np.ndarray:
    """Convert weights to uint8 pixels: 0 is gray, and the largest weight has full contrast."""
    largest = max(np.abs(kernel).max(), np.finfo(np.float32).tiny)
    return np.rint(127.5 + 127.5 * kernel / largest).astype(np.uint8)


def colour_shares(kernels: np.ndarray) -> np.ndarray:
    """Map kernels [n,h,w,3] to the share [n] (0 to 1) of their energy that their gray versions lack."""
    gray = kernels.mean(3, keepdims=True)
    energy = np.maximum((kernels**2).sum((1, 2, 3)), np.finfo(np.float32).tiny)
    return ((kernels - gray) ** 2).sum((1, 2, 3)) / energy
