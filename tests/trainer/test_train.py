"""Training in the test process: interruptions, what they leave, and how the run continues."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.loader import evaluation_loader, train_loader
from tests.helpers import command, exact, main, main_without_more_images, rows
from trainer import checkpoint
from trainer.monitor.metrics import Metrics
from trainer.optim import set_learning_rate


def test_an_interrupted_evaluation_is_repeated(packed, whole, tmp_path, monkeypatch):
    """SIGTERM arrives with the first batch of the second epoch's evaluation, and of the last one's."""
    out = tmp_path / "run"
    for epochs in (1, 2):

        class Interrupted:
            def __init__(self, *arguments, **options):
                self.batches = evaluation_loader(*arguments, **options)

            def __iter__(self, epochs=epochs):
                for batch in self.batches:
                    if len(rows(out / "evaluations.csv")) == epochs:
                        os.kill(os.getpid(), signal.SIGTERM)
                    self.samples = self.batches.samples
                    yield batch

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.evaluation.evaluation_loader", Interrupted)
            assert main(patch, command(packed, out)) == 143
        assert len(rows(out / "evaluations.csv")) == epochs
    assert main(monkeypatch, command(packed, out)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def test_images_that_run_out_end_a_run_with_a_checkpoint_of_the_last_step(
    packed, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    assert main_without_more_images(monkeypatch, command(packed, out)) == 1
    assert capsys.readouterr().err == "alexnet-train: too many samples cannot be decoded\n"
    assert main(monkeypatch, command(packed, out)) == 0
    assert f"continuing {out} after step 7" in capsys.readouterr().out
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_a_run_continues_bit_for_bit_in_its_form_even_if_another_is_faster_now(
    packed, whole, tmp_path, monkeypatch, capsys
):
    def stopped(*arguments, **options):
        for step, batch in enumerate(train_loader(*arguments, **options), 1):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "run"
    monkeypatch.setattr("trainer.forms.fastest_form", lambda *_: ("towers-s2d", ["two towers"]))
    assert main(monkeypatch, command(packed, uninterrupted)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.train_loader", stopped)
        assert main(patch, command(packed, out)) == 143
    assert "two towers" in capsys.readouterr().out
    monkeypatch.setattr("trainer.forms.fastest_form", lambda *_: ("grouped", []))
    assert main(monkeypatch, command(packed, out)) == 0
    assert exact(out / "metrics.csv") == exact(uninterrupted / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(uninterrupted / "evaluations.csv")
    assert exact(out / "metrics.csv") != exact(whole / "metrics.csv")  # grouped, with other rounding
    assert "- convolutions: towers-s2d" in (out / "report.md").read_text()


def test_the_rates_and_crops_of_the_release_are_those_of_the_run_and_survive_an_interruption(
    packed, tmp_path, monkeypatch
):
    """An epoch is 5 steps of 12 images."""
    options = ["--schedule=steps", "--drop-epochs=1,2", "--learning-rate=.001", "--bias-learning-rate=2"]
    options += [
        "--warmup-epochs=0",
        "--bias-schedule=constant",
        "--layer-learning-rates=conv1@1.2=0.1",
        "--freeze-conv1-epoch=2.4",
    ]
    rates, chunks = [], set()

    def recording(optimizer, *arguments):
        set_learning_rate(optimizer, *arguments)
        rates.append({group["lr"] for group in optimizer.param_groups})

    def stopped(dataset, plan, steps, *arguments, **others):
        chunks.add(plan.crop_chunk)
        for step, batch in enumerate(train_loader(dataset, plan, steps, *arguments, **others), 1):
            if step == 7 and not steps.start:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    whole, parts = ([*command(packed, tmp_path / name), *options, "--crop-chunk=5"] for name in "ab")
    assert main(monkeypatch, whole) == 0
    monkeypatch.setattr("pipeline.training.train_loader", stopped)
    monkeypatch.setattr("trainer.train.set_learning_rate", recording)
    assert main(monkeypatch, parts) == 143
    assert main(monkeypatch, parts) == 0
    assert chunks == {5}
    bias, tenths = 0.002, [0.001, 0.0001, 0.00001]
    expected = [{bias, tenths[0]}] * 4 + [{bias, tenths[1]}] + [{bias, tenths[1], tenths[2]}] * 4
    expected += [{bias, tenths[2], 1e-6}] * 2 + [{bias, tenths[2], 0.0}] * 4
    assert [sorted(step) for step in rates] == [pytest.approx(sorted(step)) for step in expected]
    assert exact(tmp_path / "a" / "metrics.csv") == exact(tmp_path / "b" / "metrics.csv")


def test_training_continues_while_the_disk_is_full_and_saves_as_soon_as_it_can(
    packed, whole, tmp_path, monkeypatch, capsys
):
    write, saved = checkpoint.write, []

    def full_at_first(folder, step, *arguments):
        saved.append(step)
        if step < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, step, *arguments)

    class Inline(SimpleNamespace):
        """A thread that does its work when it is started, so its failure is known at once."""

        def start(self):
            self.target(*self.args)

        def join(self):
            pass

    out = tmp_path / "run"
    monkeypatch.setattr("trainer.saver.threading", SimpleNamespace(Thread=Inline))
    monkeypatch.setattr(checkpoint, "write", full_at_first)
    monkeypatch.setattr("trainer.saver.RETRY_SECONDS", 0.0)
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "3", "--keep-checkpoints", "9")) == 0
    output = capsys.readouterr().out
    assert output.count("cannot be written: No space left on device: training goes on") == 1
    assert saved[:2] == [3, 4]
    assert saved[-3:] == [10, 12, 15]
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def test_a_damaged_checkpoint_is_skipped_and_the_losses_are_the_same(
    packed, whole, tmp_path, monkeypatch, capsys
):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "2")) == 0
    output = capsys.readouterr().out
    assert f"{newest} is damaged" in output
    assert "continuing" in output
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_the_run_folder_describes_the_run_and_its_results(packed, whole):
    settings = json.loads((whole / "settings.json").read_text())
    assert (settings["recipe"], settings["batch"], settings["schedule"]) == ("demo", 12, "cosine")
    environment = json.loads((whole / "environment.json").read_text())[-1]
    assert {"torch", "nvidia-dali-cuda130", "commit", "cpu", "cores"} <= environment.keys()
    assert [int(row["step"]) for row in rows(whole / "metrics.csv")] == list(range(1, 16))
    assert [int(row["step"]) for row in rows(whole / "evaluations.csv")] == [5, 10, 15]
    report = (whole / "report.md").read_text()
    last = rows(whole / "evaluations.csv")[-1]
    assert f"{float(last['top1_error']):.2%}" in report
    for picture in ("loss.png", "error.png", "images_per_second.png"):
        assert f"({picture})" in report
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")


def test_evaluating_every_second_epoch_changes_nothing_else(packed, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, "--evaluate-epochs", "2")) == 0
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")[1:]
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    steps = [path.name for path in sorted((out / "checkpoints").glob("step-*"))]
    assert steps == ["step-000000010.pt", "step-000000015.pt"]


def test_evaluate_reproduces_the_error_of_the_best_epoch(whole, monkeypatch, capsys):
    evaluations = rows(whole / "evaluations.csv")
    best = min(evaluations, key=lambda row: float(row["top1_error"]))
    assert main(monkeypatch, ["-m", "trainer.cli", "evaluate", str(whole), "--checkpoint", "best"]) == 0
    said = f"step {best['step']}, val, centre crop: top-1 error {float(best['top1_error']):.2%}"
    assert said in capsys.readouterr().out


def damaged_after(steps: int, shard: Path, damage: Callable[[Path], None]) -> Callable:
    """Return a training loader that damages a shard after a number of steps."""

    def loader(*arguments, **options):
        batches = train_loader(*arguments, **options)
        yield from islice(batches, steps)
        damage(shard)
        yield from batches

    return loader


@pytest.mark.usefixtures("_larger_than_memory")
def test_a_shard_truncated_during_a_run_ends_it_with_a_checkpoint_and_a_new_copy_continues_it(
    packed, whole, tmp_path, monkeypatch, capsys
):
    data, out = Path(shutil.copytree(packed, tmp_path / "data")), tmp_path / "run"
    shard = data / "train-000001.tar"
    content = shard.read_bytes()
    with monkeypatch.context() as patch:
        cut = damaged_after(7, shard, lambda path: os.truncate(path, 0))
        patch.setattr("pipeline.training.train_loader", cut)
        assert main(patch, command(data, out, "--max-bad-samples", "5")) == 1
    output = capsys.readouterr()
    assert output.out.count("left out: the sample in") == 6
    [line] = output.err.splitlines()
    assert line.startswith(
        f"alexnet-train: more than 5 samples are damaged, the last of them the sample in {shard} at byte"
    )
    assert line.endswith("shorter: copy the shard again, or allow more with --max-bad-samples")
    [newest] = sorted(path.stem for path in (out / "checkpoints").iterdir())[-1:]
    assert newest == f"step-{int(rows(out / 'metrics.csv')[-1]['step']):09d}"

    with open(shard, "r+b") as file:
        file.write(content)
    assert main(monkeypatch, command(data, out)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


@pytest.mark.usefixtures("_larger_than_memory")
def test_a_shard_that_becomes_unreadable_is_left_out_within_the_limit(packed, tmp_path, monkeypatch, capsys):
    """Reading the lowest addresses of a process through its `mem` file fails with EIO."""
    data, out = Path(shutil.copytree(packed, tmp_path / "data")), tmp_path / "run"
    shard = data / "train-000001.tar"

    def fail(path: Path) -> None:
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.resolve() == path:
                os.dup2(memory, int(descriptor.name))
        os.close(memory)

    metrics = Metrics()
    monkeypatch.setattr("trainer.train.Metrics", lambda: metrics)
    monkeypatch.setattr("pipeline.training.train_loader", damaged_after(2, shard, fail))
    assert main(monkeypatch, command(data, out)) == 0
    counted = metrics.registry.get_sample_value("alexnet_input_errors_total", {"reason": "unreadable"})
    output = capsys.readouterr().out
    lost = [line for line in output.splitlines() if "left out" in line]
    assert len(lost) == 20  # all samples of the shard
    assert counted == 20
    assert all(f"the sample in {shard} at byte" in line for line in lost)
    assert all("cannot be read: Input/output error" in line for line in lost)
    assert [int(row["step"]) for row in rows(out / "evaluations.csv")] == [5, 10, 15]


def test_the_first_interval_does_not_include_start_up_and_calibration(packed, tmp_path, monkeypatch):
    from trainer.train import Trainer

    prepared = Trainer.run_to_end
    pause = 5.0

    def late(trainer: Trainer) -> None:
        time.sleep(pause)
        prepared(trainer)

    monkeypatch.setattr(Trainer, "run_to_end", late)
    assert main(monkeypatch, command(packed, tmp_path / "run", "--epochs", "1")) == 0
    first = rows(tmp_path / "run" / "metrics.csv")[0]
    assert 12 / float(first["images_per_second"]) < pause
