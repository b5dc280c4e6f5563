"""A short run of the kill matrix, and its failure if anything is lost or differs.

The long version is `python tests/endurance/chaos.py --data shards --kills 200`.
"""

import fcntl
import json
from collections import Counter
from itertools import cycle

import pytest
import torch

from tests.endurance import chaos, checks, runs
from tests.endurance.checks import DifferenceError
from tests.endurance.lives import MOMENTS, Watch
from trainer import checkpoint
from trainer.run import Run

CPU = torch.device("cpu")
PRECISION = ("--precision", "fp32")


@pytest.mark.slow
def test_runs_killed_at_any_moment_give_the_undisturbed_result(packed, tmp_path, monkeypatch, call):
    """All aims occur equally often; what a kill hits depends on the speed of the machine."""
    aims, draw = cycle(runs.AIMS), runs.Chaos.draw
    monkeypatch.setattr(runs.Chaos, "draw", lambda self, world: draw(self, world)._replace(aim=next(aims)))
    folder = tmp_path / "runs"
    arguments = ("--kills", "12", "--command-kills", "0", "--epochs", "3", *PRECISION)
    done = call(chaos.main, "--data", packed, "--folder", folder, *arguments)
    assert done.returncode == 0, done.stderr
    scenarios = json.loads(done.stdout.splitlines()[-1])["scenarios"]
    assert len(scenarios) == 4
    kills: Counter[str] = sum((Counter(scenario["kills"]) for scenario in scenarios.values()), Counter())
    assert kills.total() == 12
    assert kills.keys() <= set(MOMENTS)
    assert [scenario["loss_difference"] for scenario in scenarios.values()][:2] == [0.0, 0.0]
    assert not folder.exists()


@pytest.mark.slow
def test_a_weight_that_differs_from_the_saved_one_is_found(packed, tmp_path, monkeypatch, call):
    """A checkpoint in the middle of the run is altered but has a matching checksum."""

    def altered(run: Run, durable: int) -> int:
        step = checks.check_saved(run, durable)
        state, _ = checkpoint.load(run.checkpoints, CPU)
        state["model"]["conv1.bias"][0] += 1e-3
        checkpoint.write(run.checkpoints, step, state, keep=2)
        return step

    third_write = runs.Strike("checkpoint write", delay=0.0, nth=3, rank=None)
    monkeypatch.setattr(runs.Chaos, "draw", lambda self, world: third_write)
    monkeypatch.setattr(runs, "check_saved", altered)
    folder = tmp_path / "runs"
    # Enough epochs that steps follow, even on a machine where most writes are too fast to be noticed.
    arguments = ("--kills", "1", "--command-kills", "0", "--epochs", "6", *PRECISION)
    done = call(chaos.main, "--data", packed, "--folder", folder, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("chaos: loss of step ")
    assert (folder / "1-0" / "metrics.csv").exists()  # kept for inspection


@pytest.fixture
def killed(tmp_path) -> Run:
    """The files of a run that was killed after step 5, and saved at steps 2 and 4."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / ".lock").touch()
    for step in range(1, 6):
        row = {"step": step, "epoch": step / 2, "loss": 1.0}
        run.metrics.append(row | {"error": 0.5, "images_per_second": 9.0})
        if step == 4:
            run.evaluations.append(row | {"top1_error": 0.5, "top5_error": 0.1})
        if step in (2, 4):
            state = {"step": step, "errors": [0.5] * (step == 4)}
            checkpoint.write(run.checkpoints, step, state, keep=2, best=step == 4)
    return run


def test_the_moment_of_a_kill_is_read_from_the_files(tmp_path):
    """An epoch has two steps. One life starts without a checkpoint, and another with one."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()

    first = Watch(run, batch=4, samples=8)
    assert first.moment() == "start-up"
    run.record_environment("CPU")
    assert first.moment() == "training"
    run.metrics.append({"step": 1})
    assert first.moment() == "training"
    run.metrics.append({"step": 2})
    assert first.moment() == "evaluation"
    run.evaluations.append({"step": 2})
    assert first.moment() == "training"
    run.checkpoints.mkdir()
    (run.checkpoints / ".step-000000002.pt.partial").touch()
    assert first.moment() == "checkpoint write"

    second = Watch(run, batch=4, samples=8)
    assert second.moment() == "start-up"  # the partial file is from the life before
    checkpoint.write(run.checkpoints, 2, {"step": 2}, keep=2)
    assert second.durable == 0
    assert (second.moment(), second.durable) == ("start-up", 2)
    assert Watch(run, batch=4, samples=8).moment() == "resume"


def test_a_lost_or_damaged_checkpoint_is_found(killed):
    assert checks.check_saved(killed, durable=4) == 4
    with pytest.raises(DifferenceError, match="newest checkpoint is of step 4, but there was one of step 5"):
        checks.check_saved(killed, durable=5)
    (killed.checkpoints / "best-000000004.pt").unlink()
    with pytest.raises(DifferenceError, match="no best checkpoint"):
        checks.check_saved(killed, durable=4)
    newest = killed.checkpoints / "step-000000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(DifferenceError, match=r"step-000000004\.pt is damaged"):
        checks.check_saved(killed, durable=4)


@pytest.mark.parametrize("table", ["metrics", "evaluations"])
def test_missing_rows_before_a_checkpoint_are_found(killed, table):
    getattr(killed, table).truncate(3)
    with pytest.raises(DifferenceError, match=f"{table}.csv lacks rows up to the saved step 4"):
        checks.check_saved(killed, durable=4)


def test_files_and_a_lock_left_behind_by_a_kill_are_found(killed):
    for step in (6, 8):
        (killed.checkpoints / f".step-{step:09}.pt.partial").touch()
    with pytest.raises(DifferenceError, match="2 temporary files"):
        checks.check_saved(killed, durable=4)
    (killed.checkpoints / ".step-000000008.pt.partial").unlink()
    with open(killed.folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DifferenceError, match="is locked"):
            checks.check_saved(killed, durable=4)


def test_images_are_compared_in_the_order_of_the_batch(tmp_path):
    """Steps have four images, on one process and then on two, which repeat step 1."""
    records = tmp_path / "records"
    records.mkdir()
    (records / "0000-1.0").write_text("0 a b c d\n1 e f g h\n")
    (records / "0001-2.0").write_text("1 e f\n2 i j\n")
    (records / "0001-2.1").write_text("1 g h\n2 k l\n")
    images, begun = checks.read_images(records, batch=4)
    assert {step: "".join(row[position] for position in range(4)) for step, row in images.items()} == {
        0: "abcd",
        1: "efgh",
        2: "ijkl",
    }
    assert begun == 4
    assert checks.begun_steps(records, "0001-2") == (1, 3)
    checks.check_images(images, images)  # finds no difference, or raises
    other = {**images, 2: {**images[2], 3: "x"}}
    with pytest.raises(DifferenceError, match="image 3 of step 2 is l, without kills x"):
        checks.check_images(images, other)
    (records / "0002-1.0").write_text("2 i j x l\n")
    with pytest.raises(DifferenceError, match="image 2 of step 2 differs from an earlier life"):
        checks.read_images(records, batch=4)


def test_states_are_compared_bit_for_bit(tmp_path):
    state = {"model": {"weight": torch.zeros(2)}, "errors": [0.5], "time": 1.0}
    checks.check_same(state, state | {"time": 2.0}, "it")  # finds no difference, or raises
    with pytest.raises(DifferenceError, match="it, model, weight differs"):
        checks.check_same(state, {**state, "model": {"weight": torch.tensor([0.0, 1e-30])}}, "it")
    with pytest.raises(DifferenceError, match="it, errors"):
        checks.check_same(state, {**state, "errors": [0.25]}, "it")


def test_a_folder_that_is_not_empty_is_refused(packed, tmp_path, call):
    (tmp_path / "something").touch()
    done = call(chaos.main, "--data", packed, "--folder", tmp_path)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
