"""Write the report of a run, report.md with PNG curves, from the files in the run folder."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

from pipeline import Dataset
from pipeline.files import atomic_write, path_in_errors
from pipeline.manifest import Manifest
from trainer.details import read_details
from trainer.monitor.details_report import describe
from trainer.monitor.summary import TOP5_CLASSES
from trainer.run import REPORT, Run, RunError

Series = list[tuple[str, list[float], list[float]]]  # name, epochs, values


def write_report(run: Run, dataset: Dataset) -> Path:
    """Write report.md and its pictures into the run folder, and return the report's path.

    Raises OSError, RunError if a table is missing, ContentError if one is damaged, and DatasetError if the
    dataset cannot be read.
    """
    classes = len(dataset.manifest.classes)
    steps, evaluations = run.metrics.rows(), run.evaluations.rows()
    for table, rows in ((run.metrics, steps), (run.evaluations, evaluations)):
        if not rows:
            raise RunError(f"cannot write a report: {table.path} has no rows. Restore it from a copy")

    def series(name: str, rows: list[dict[str, float]], column: str) -> tuple[str, list[float], list[float]]:
        return name, [row["epoch"] for row in rows], [row[column] for row in rows]

    _plot(
        run.folder / "loss.png",
        "cross-entropy",
        [series("training", steps, "loss"), series("validation", evaluations, "loss")],
    )
    _plot(
        run.folder / "error.png",
        "error",
        [
            series("training, top-1", steps, "error"),
            series("validation, top-1", evaluations, "top1_error"),
            series("validation, top-5", evaluations, "top5_error"),
        ][: 3 if classes >= TOP5_CLASSES else 2],
    )
    _plot(run.folder / "images_per_second.png", "images/s", [series("training", steps, "images_per_second")])
    details = read_details(run.folder, classes)  # a run of an earlier version has none
    described = describe(run.folder, details, dataset, "val") if details else []
    path = run.folder / REPORT
    with atomic_write(path) as file:
        text = _text(run, dataset.manifest, steps, evaluations, described)
        file.write(text.encode(errors="backslashreplace"))
    return path


def _plot(path: Path, label: str, series: Series) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, epochs, values in series:
        axes.plot(epochs, values, label=name, marker="o" if "validation" in name else None, markersize=3)
    axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with path_in_errors(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _text(
    run: Run, manifest: Manifest, steps: list[dict], evaluations: list[dict], described: list[str]
) -> str:
    settings = run.recorded_settings()
    resolved = settings.pop("resolved", {})
    settings.pop("data_from_run", None)
    environment = (run.starts() or [{}])[-1]  # empty if environment.json is missing
    images = manifest.splits["train"].samples
    rates = sorted(row["images_per_second"] for row in steps)
    last, best = evaluations[-1], min(evaluations, key=lambda row: row["top1_error"])
    with_top5 = len(manifest.classes) >= TOP5_CLASSES
    top5 = f", top-5 error {last['top5_error']:.2%}" if with_top5 else ""
    columns = ["{epoch:.2f}", "{top1_error:.2%}", *["{top5_error:.2%}"] * with_top5, "{loss:.4f}"]
    heads = ["epoch", "top-1 error", *["top-5 error"] * with_top5, "loss"]
    early = ""
    if last["epoch"] < settings["epochs"]:
        early = (
            f" The run stopped early: in {settings['stop_after']} evaluations, the top-1 error was not lower "
            f"than after {best['epoch']:.2f} epochs ({best['top1_error']:.2%}), whose checkpoint is kept."
        )
    return "\n".join(
        [
            f"# {run.folder.name}: recipe {settings['recipe']}",
            "",
            f"After {last['epoch']:.2f} epochs of {images:,} images in {len(manifest.classes):,} classes: "
            f"validation top-1 error {last['top1_error']:.2%}{top5} "
            f"(centre crop, {manifest.splits['val'].samples:,} images).{early}",
            "",
            f"Training ran at {rates[len(rates) // 2]:,.1f} images/s (median of {len(rates)} intervals, "
            f"{rates[0]:,.1f} to {rates[-1]:,.1f}).",
            "",
            *(f"![{name}]({name}.png)" for name in ("loss", "error", "images_per_second")),
            "",
            "## Validation",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *(f"| {' | '.join(columns)} |".format(**row) for row in evaluations),
            "",
            *([*described, ""] if described else []),
            "## Settings",
            "",
            *(f"- {name}: {value}" for name, value in (settings | resolved).items() if value is not None),
            "",
            "## Environment of the last start",
            "",
            *(f"- {name}: {value}" for name, value in environment.items()),
            "",
        ]
    )
