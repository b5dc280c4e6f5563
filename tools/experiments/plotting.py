"""Draw a plot into a PNG file. Importing matplotlib takes a second, so it is imported only for that."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot_file(
    path: Path, height: float, width: float = 6.4, panels: int = 1, dpi: int = 110
) -> Iterator[Any]:
    """Lend the axes of a new plot, or an array of them side by side, and save the plot after the block.

    height, width: in inches. panels: number of axes.
    """
    import matplotlib

    matplotlib.use("Agg")  # writes files without a display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained")
    yield axes
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
