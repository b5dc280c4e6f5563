"""Runs on a mixture of datasets with balanced classes keep the promises of a run on one dataset."""

import shutil
from pathlib import Path

import pytest

from tests.helpers import command, exact, main, main_without_more_images
from tests.trees import pack_here
from trainer.run import Run


@pytest.fixture(scope="module")
def folder(packed: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packed pictures as `a`, and their validation images as all splits of `b`."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(packed, folder / "a")
    for split in ("train", "val"):
        shutil.copytree(pictures / "val", folder / "source" / split)
    pack_here("--input", folder / "source", "--out", folder / "b", "--size", "80")
    return folder


@pytest.fixture(scope="module")
def mixed_run(folder: Path) -> Path:
    """A finished run of 18 steps on both datasets, whose paths are relative."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(patch, weighted_command("runs/whole")) == 0
    return folder / "runs/whole"


def weighted_command(out: str, *arguments: str) -> list[str]:
    settings = ("--epochs", "2", "--balance", "1", "--checkpoint-steps", "2")
    return command(Path("a=0.7,b=0.3"), Path(out), *settings, *arguments)


def test_a_weighted_run_that_was_interrupted_continues_bit_for_bit(folder, mixed_run, monkeypatch):
    monkeypatch.chdir(folder)
    assert main_without_more_images(monkeypatch, weighted_command("runs/stopped")) == 1
    assert main(monkeypatch, weighted_command("runs/stopped")) == 0
    assert len(exact(mixed_run / "metrics.csv")) == 14  # of 12 images; 2 epochs of 60 + 20 need 13.3
    assert exact(folder / "runs/stopped/metrics.csv") == exact(mixed_run / "metrics.csv")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--data", "a=0.6,b=0.4"), "dataset"),
        (("--data", "a"), "dataset"),
        (("--balance", "0.5"), "balance"),
    ],
)
def test_a_run_is_not_continued_with_other_weights(folder, mixed_run, arguments, named, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(monkeypatch, weighted_command("runs/whole", *arguments)) == 2
    assert f"already holds another run, which differs in {named} (" in capsys.readouterr().err


def test_a_weighted_run_is_evaluated_on_the_first_dataset_from_any_folder(
    folder, mixed_run, monkeypatch, capsys
):
    monkeypatch.chdir(mixed_run.parent)
    assert Run(Path("whole")).settings().data == Path("../a=0.7,../b=0.3")
    results = []
    for data in ([], ["--data", "../a"]):
        assert main(monkeypatch, ["-m", "trainer.cli", "evaluate", "whole", *data]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]
    assert "over 20 images" in results[0]
    report = (mixed_run / "report.md").read_text()
    assert "- data: a=0.7,b=0.3" in report
    assert "- balance: 1.0" in report


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (["a=x,b=1"], 2, "--data a=x,b=1: the weight of a should be a number greater than 0, not x"),
        (["a=0", "b=0"], 2, "--data a=0,b=0: the weight of a should be a number greater than 0, not 0"),
        (["a=1", "c=1"], 1, "no dataset at c: the folder does not exist"),
        (["a=1,a/../a=1"], 1, "a/../a is the same dataset as a: omit one of them"),
    ],
)
def test_weights_that_make_no_sense_are_one_line(folder, data, code, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = [argument for part in data for argument in ("--data", part)]
    assert main(monkeypatch, ["-m", "trainer.cli", "--out", "runs/none", *arguments]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "runs/none").exists()
