"""Draw the differences of a record's systems, with their 95 % intervals: a forest plot."""

from pathlib import Path

from tools.experiments.plotting import plot_file
from tools.experiments.record import Figure, Record


def forest(path: Path, record: Record, measure: str) -> Figure:
    """Draw the differences of a measure from the row that the others are compared with; return the figure.

    The first system is at the top. Published differences are marked, and a single seed has no interval.
    """
    rows = [row for row in record.rows if row.than]
    with plot_file(path, height=1.2 + 0.28 * len(rows)) as axes:
        axes.axvline(0, color="black", linewidth=0.8)
        for height, row in enumerate(rows):
            result = record.result(row, measure)
            if result.interval is not None:
                axes.plot(result.interval[1:], [height, height], color="C0", linewidth=1.6)
            axes.plot(result.mean, height, "o", color="C0")
            if measure in row.published:
                axes.plot(row.published[measure], height, "D", color="C3", fillstyle="none")
        axes.plot([], [], "o-", color="C0", label="measured, 95 %")
        axes.plot([], [], "D", color="C3", fillstyle="none", label="published")
        axes.set_yticks(range(len(rows)), [row.system for row in rows])
        axes.set_xlabel(f"{measure}: difference from {rows[0].than}")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # above all intervals
    caption = (
        f"Differences from {rows[0].than} in the {measure}, with 95 % intervals. Where the paper gives a "
        "difference, it is marked."
    )
    return Figure(file=path.name, caption=caption)
