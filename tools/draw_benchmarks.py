"""Draw the figures of docs/benchmarks.md from the records of `alexnet-train bench`.

    python tools/draw_benchmarks.py docs/benchmarks

Reads every *.jsonl in the folder and writes stages.png (the newest record of each stage, with a bar for each
candidate) and sweeps.png (the newest record of each swept setting). Bars and points are medians; the error
bars reach from the slowest to the fastest run.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Figures = dict[str, list[float]]  # candidate → a figure for each run


def read_records(folder: Path) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return the newest figures of each stage, and of each sweep as `stage by setting`. Raises ValueError."""
    stages: dict[str, Figures] = {}
    sweeps: dict[str, Figures] = {}
    for file in sorted(folder.glob("*.jsonl")):  # file names begin with the date
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                record: dict[str, Any] = json.loads(line)
                measured = record["images_per_second"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}, is not a record of alexnet-train bench") from None
            for stage, every in measured.items():
                # A candidate without runs failed.
                figures = {name: runs for name, runs in every.items() if runs}
                if not figures:
                    continue
                setting = re.search(r"--sweep (\S+)", record["command"])
                if setting:
                    sweeps[f"{stage} by {setting[1]}"] = figures
                else:
                    stages[stage] = figures
    return stages, sweeps


def spread(values: list[float]) -> tuple[float, float]:
    """Return the distances from the median to the minimum and to the maximum."""
    middle = median(values)
    return middle - min(values), max(values) - middle


def draw_stage(panel: Axes, stage: str, figures: Figures) -> None:
    names = list(figures)[::-1]  # the first candidate is drawn at the top
    middles = [median(figures[name]) for name in names]
    errors = list(zip(*(spread(figures[name]) for name in names), strict=True))
    colours = ["tab:orange" if name == names[-1] else "tab:blue" for name in names]
    places = range(len(names))
    panel.barh(places, middles, xerr=errors, color=colours, capsize=3)
    digits = 0 if max(middles) >= 100 else 1
    captions = [f"{name}  {middle:,.{digits}f}" for name, middle in zip(names, middles, strict=True)]
    panel.set_yticks(places, captions)
    panel.set(title=stage, xlabel="images/s")
    panel.locator_params(axis="x", nbins=6)
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.grid(axis="x", alpha=0.3)


def draw_sweep(panel: Axes, title: str, figures: Figures) -> None:
    values = [float(name.rpartition(" ")[2]) for name in figures]
    errors = list(zip(*map(spread, figures.values()), strict=True))
    panel.errorbar(values, [median(runs) for runs in figures.values()], yerr=errors, marker="o", capsize=3)
    panel.set(title=title, xlabel=title.rpartition(" ")[2], ylabel="images/s", ylim=(0, None), xticks=values)
    panel.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder with the records, *.jsonl")
    folder = parser.parse_args().folder
    try:
        stages, sweeps = read_records(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"draw_benchmarks: {error}")
    if not stages and not sweeps:
        sys.exit(
            f"draw_benchmarks: {folder} has no records: write some with alexnet-train bench --record FILE"
        )
    for name, panels, draw in (("stages", stages, draw_stage), ("sweeps", sweeps, draw_sweep)):
        if not panels:
            continue
        rows = -(-len(panels) // 2)
        figure, axes = plt.subplots(rows, 2, figsize=(11, 2.8 * rows), layout="constrained", squeeze=False)
        for panel in axes.flat[len(panels) :]:
            panel.set_axis_off()
        for panel, (title, figures) in zip(axes.flat, panels.items(), strict=False):
            draw(panel, title, figures)
        figure.savefig(folder / f"{name}.png", dpi=100)
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
