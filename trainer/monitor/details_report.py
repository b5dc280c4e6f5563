"""Describe the details of an evaluation, in a run's report or in a report of their own."""

from pathlib import Path

from pipeline import Dataset
from pipeline.files import atomic_write
from pipeline.manifest import Class
from trainer.details import BY_CLASS, CONFUSION, WORST, Details
from trainer.monitor.details_pictures import MATRIX_CLASSES, draw_matrix, draw_mistakes, draw_pairs
from trainer.monitor.names import as_markdown, plain_names

EVALUATION = "evaluation.md"
_CLASSES = 20  # the most classes in the table


def write_evaluation(folder: Path, title: str, details: Details, dataset: Dataset, split: str) -> Path:
    """Write the tables, the pictures and evaluation.md into a folder, and return the path of the last.

    title: what was evaluated, and its scores. Raises OSError, and DatasetError if the dataset cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    details.write(folder, dataset.manifest.classes, dataset.reader(split))
    path = folder / EVALUATION
    lines = [f"# Evaluation of {title}", "", *describe(folder, details, dataset, split), ""]
    with atomic_write(path) as file:
        file.write("\n".join(lines).encode(errors="backslashreplace"))
    return path


def describe(folder: Path, details: Details, dataset: Dataset, split: str) -> list[str]:
    """Draw the pictures into the folder, and return the lines of a report with them. Raises as above."""
    classes = dataset.manifest.classes
    lines = ["## Errors by class", "", *_table(details, classes), ""]
    lines += [
        f"All classes are in [{BY_CLASS}]({BY_CLASS}), all pairs of them in [{CONFUSION}]({CONFUSION})."
    ]
    if len(classes) <= MATRIX_CLASSES:
        draw_matrix(folder / "confusion.png", details, classes)
        lines += ["", "![confusion matrix](confusion.png)"]
    if details.mistakes:
        draw_pairs(folder / "worst_pairs.png", details, classes)
        draw_mistakes(folder / "mistakes.png", details, classes, dataset.reader(split))
        lines += [
            "",
            "![most frequent mistakes](worst_pairs.png)",
            "",
            "## Most confident mistakes",
            "",
            "The predicted class and its probability are red, and the true class is black. "
            f"[{WORST}]({WORST}) says where each image is.",
            "",
            "![most confident mistakes](mistakes.png)",
        ]
    return lines


def _table(details: Details, classes: tuple[Class, ...]) -> list[str]:
    names = list(map(as_markdown, plain_names(classes, 40)))
    taken_for: dict[int, int] = {}  # for each class, the wrong class that was predicted most often
    for label, predicted, _ in details.worst_pairs():
        taken_for.setdefault(label, predicted)
    errors = [each for each in details.by_class(len(classes)) if each.errors]
    worst = sorted(errors, key=lambda each: (-each.error, -each.images, each.label))[:_CLASSES]
    if not worst:
        return ["There are no errors."]
    return [
        "| class | images | errors | top-1 error | most often taken for |",
        "|---|---|---|---|---|",
        *(
            f"| {names[each.label]} | {each.images:,} | {each.errors:,} | {each.error:.1%} "
            f"| {names[taken_for[each.label]]} |"
            for each in worst
        ),
    ]
