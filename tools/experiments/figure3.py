"""Repeat Fig. 3: draw the kernels of the first layer by tower, and test whether the towers differ in colour.

    alexnet-train paper figure3 runs/0 runs/1 runs/2

The picture shows the first run: the first tower's kernels on top and the second's below, in rows of 16, as in
the paper. Each kernel is scaled by its own largest weight, which is drawn at full contrast; 0 is gray. The
colour share of a kernel is the share of its energy (the sum of its squared weights) that is lost when it is
converted to gray: 0 % for a kernel that ignores colour, 67 % for independent weights.

According to the paper, one tower is largely colour-agnostic and the other largely colour-specific in every
run, but not always the same one. The statistic is therefore the mean over the runs of the absolute difference
between the two towers' mean colour shares. Under the null hypothesis, the tower of a kernel has nothing to do
with its colour, so the kernels of a run may be exchanged between its towers. 10,000 random exchanges within
every run give the statistic's distribution and p = (1 + number of exchanges whose statistic is at least as
large as the measured one) / 10,001. The towers count as specialised if p < .01.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.experiments import finished
from tools.experiments.record import Figure, Record, Row
from trainer.settings import SettingsError

TAKES_SETTINGS = False
COLUMNS = 16  # maximum number of kernels in a row
SCALE = 4  # pixels of the picture per weight
GAP = 4  # pixels between kernels
LABEL = 24  # height of the line above a tower's kernels, in pixels
EXCHANGES, SIGNIFICANT = 10_000, 0.01
COLOUR = "mean colour share of a kernel's energy (%)"
COLOURFUL = "kernels with a colour share above 33 % (%)"
EXCESS = "absolute difference of the towers' mean colour shares, minus that by chance (points)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser, several=True)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Draw figure3.png and compare the towers.

    Raises SettingsError if the nets' first layers have different shapes, and what `open_runs` raises.
    """
    opened = finished.open_runs(options)
    nets = [
        by_tower(net.conv1.weight.detach().float().cpu().numpy(), net.variant.towers)
        for net in (each.net for each in opened)
    ]
    if len({net.shape for net in nets}) > 1:
        raise SettingsError("the first layers of these nets have different shapes: give runs of the same net")
    draw(nets[0]).save(options.out / "figure3.png")
    shares = np.array([[colour_shares(kernels) for kernels in net] for net in nets])  # [runs,towers,kernels]
    _, towers, count = shares.shape
    rows = [
        Row(
            system=f"tower {number + 1}, {count} kernels",
            measured={
                COLOUR: (100 * shares[:, number].mean(1)).tolist(),
                COLOURFUL: (100 * (shares[:, number] > 1 / 3).mean(1)).tolist(),
            },
        )
        for number in range(towers)
    ]
    remarks = [
        "The independent weights with which training begins have a colour share of 67 %. After few "
        "epochs, part of that remains in these numbers."
    ]
    if towers == 2:
        chance, p = permutation_test(shares)
        differences = tower_differences(shares)
        verdict = f"{'shown' if p < SIGNIFICANT else 'not shown'}: p = {p:.4f}"
        rows.append(
            Row(
                system="difference of the towers",
                measured={EXCESS: (100 * (differences - chance)).tolist()},
                claims={EXCESS: f"One tower is largely colour-agnostic (Fig. 3, 6.1; {verdict})"},
            )
        )
        remarks.append(_result(shares, 100 * differences.mean(), 100 * chance.mean(), p))
    return Record(
        experiment="figure3",
        title="Fig. 3: the kernels of the first layer",
        source="Fig. 3 and section 6.1: one tower's kernels are largely colour-agnostic, the other's largely "
        "colour-specific, in every run",
        rows=rows,
        remarks=remarks,
        figures=[Figure(file="figure3.png", caption=_caption(towers))],
        **opened[0].about(*opened[1:]),
    )


def tower_differences(shares: np.ndarray) -> np.ndarray:
    """Return the absolute difference between the towers' means, given colour shares [...,2,kernels]."""
    first, second = np.moveaxis(shares.mean(-1), -1, 0)
    return np.abs(first - second)


def permutation_test(shares: np.ndarray) -> tuple[np.ndarray, float]:
    """Test whether a kernel's colour depends on its tower, as the module's docstring says.

    shares: colour shares [runs,2,kernels]. Returns the mean difference over the exchanges of each run [runs],
    and p.
    """
    rng = np.random.default_rng(0)
    exchanged = np.zeros((len(shares), EXCHANGES))
    for run, found in zip(shares, exchanged, strict=True):
        orders = rng.permuted(np.tile(run.ravel(), (EXCHANGES, 1)), axis=1)
        found[:] = tower_differences(orders.reshape(EXCHANGES, *run.shape))
    # Exchanges that swap both towers as a whole have the same statistic but for rounding.
    as_large = (exchanged.mean(0) >= tower_differences(shares).mean() - 1e-9).sum()
    return exchanged.mean(1), (1 + as_large) / (1 + EXCHANGES)


def _result(shares: np.ndarray, difference: float, chance: float, p: float) -> str:
    """Say what the permutation test found. difference, chance: in points."""
    runs = "; ".join(f"{first:.1f} and {second:.1f}" for first, second in 100 * shares.mean(2))
    verdict = "differ in colour, as published" if p < SIGNIFICANT else "are not shown to differ in colour"
    return (
        f"Mean colour shares (%) of the two towers, run by run: {runs}. They differ by {difference:.1f} "
        f"points on average, and by {chance:.1f} if kernels are exchanged at random: p = {p:.4f} from "
        f"{EXCHANGES:,} exchanges. With p < {SIGNIFICANT:g} as the criterion, the towers {verdict}."
    )


def _caption(towers: int) -> str:
    order = ", the first tower's above and the second's below" if towers == 2 else ""
    return f"The first run's kernels of 11×11×3 weights{order}. Each kernel is stretched to its own contrast."


def by_tower(weights: np.ndarray, towers: int) -> np.ndarray:
    """Reshape [kernels,3,11,11] to [towers,n,11,11,3]; each group of conv2 reads one tower's maps."""
    return weights.reshape(towers, -1, *weights.shape[1:]).transpose(0, 1, 3, 4, 2)


def draw(towers: np.ndarray) -> Image.Image:
    """Draw the kernels [towers,n,h,w,3] on white, at most COLUMNS in a row, below a label for each tower."""
    count, kernels, side = towers.shape[:3]
    cell = side * SCALE + GAP
    rows = -(-kernels // COLUMNS)
    columns = -(-kernels // rows)  # fills the rows evenly
    height = LABEL + rows * cell  # of a tower with its label and the gap below
    sheet = Image.new("RGB", (columns * cell - GAP, count * height - GAP), "white")
    text = ImageDraw.Draw(sheet)
    for tower in range(count):
        share = colour_shares(towers[tower]).mean()
        label = f"tower {tower + 1}: mean colour share {100 * share:.0f} %"
        text.text((0, tower * height + 3), label, "black", ImageFont.load_default(15))
        for number, kernel in enumerate(towers[tower]):
            row, column = divmod(number, columns)
            pixels = contrast(kernel).repeat(SCALE, 0).repeat(SCALE, 1)
            sheet.paste(Image.fromarray(pixels), (column * cell, tower * height + LABEL + row * cell))
    return sheet


def contrast(kernel: np.ndarray) -> np.ndarray:
    """Convert weights to uint8 pixels: 0 is gray, and the largest weight has full contrast."""
    largest = max(np.abs(kernel).max(), np.finfo(np.float32).tiny)
    return np.rint(127.5 + 127.5 * kernel / largest).astype(np.uint8)


def colour_shares(kernels: np.ndarray) -> np.ndarray:
    """Map kernels [n,h,w,3] to the share [n] (0 to 1) of their energy that their gray versions lack."""
    gray = kernels.mean(3, keepdims=True)
    energy = np.maximum((kernels**2).sum((1, 2, 3)), np.finfo(np.float32).tiny)
    return ((kernels - gray) ** 2).sum((1, 2, 3)) / energy
