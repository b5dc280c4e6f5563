"""TensorBoard's own reader finds each row of the tables once, however the run ended before."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorboard", reason="pip install 'alexnet-train[tensorboard]'")

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from tests.helpers import command, main, rows, run, signalled
from trainer.monitor.tensorboard import EventFile
from trainer.table import Table


def reader(folder: Path) -> EventAccumulator:
    """Return a reader of all events, as there is no limit to their number."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0})


def shown(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values that TensorBoard shows of each tag, read up to now."""
    tags = events.Reload().Tags()[SCALARS]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the same of the tables. Events have single precision."""
    tables = {"train": rows(folder / "metrics.csv"), "eval": rows(folder / "evaluations.csv")}
    return {
        f"{prefix}/{name}": [(int(row["step"]), float(np.float32(row[name]))) for row in table]
        for prefix, table in tables.items()
        for name in (table[0] if table else ())
        if name != "step"
    }


@pytest.fixture
def table(tmp_path) -> Table:
    """A table of three steps, in the folder of a run."""
    table = Table(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        table.append({"step": step, "loss": step / 7, "error": 0.5})
    return table


def append(table: Table, events: EventFile, step: int) -> None:
    row = {"step": step, "loss": step / 7, "error": 0.25}
    table.append(row)
    events.append("train", row)


@pytest.mark.slow
def test_each_step_is_there_once_after_three_kills(packed, tmp_path):
    out = tmp_path / "run"
    arguments = command(packed, out, "--checkpoint-steps", "3", "--tensorboard")
    for steps in (5, 8, 13):
        assert signalled("SIGKILL", steps, arguments).returncode == -signal.SIGKILL
        assert len(rows(out / "metrics.csv")) == steps
        assert shown(reader(out)) == written(out)
    assert "continuing" in run(*arguments)
    found = shown(reader(out))
    assert found == written(out)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 16))
    assert [step for step, _ in found["eval/top1_error"]] == [5, 10, 15]


def test_a_new_start_replaces_whatever_earlier_ones_left(table, tmp_path):
    """They left an event of a later step and half an event, and a TensorBoard is showing them."""
    earlier = EventFile(tmp_path / "tensorboard", {"train": table})
    running = reader(tmp_path)
    times = [event.wall_time for event in running.Reload().Scalars("train/loss")]
    append(table, earlier, 4)
    append(table, earlier, 5)
    [path] = (tmp_path / "tensorboard").iterdir()
    os.truncate(path, path.stat().st_size - 9)
    assert len(shown(running)["train/loss"]) == 4
    table.truncate(3)
    events = EventFile(tmp_path / "tensorboard", {"train": table})
    append(table, events, 4)
    assert shown(reader(tmp_path)) == shown(running) == written(tmp_path)
    assert [step for step, _ in written(tmp_path)["train/loss"]] == [1, 2, 3, 4]
    assert [event.wall_time for event in running.Scalars("train/loss")][:3] == times


def test_events_that_could_not_be_written_follow_with_the_next(table, tmp_path):
    events = EventFile(tmp_path / "tensorboard", {"train": table})
    [path] = (tmp_path / "tensorboard").iterdir()
    path.rename(tmp_path / "moved")
    path.mkdir()  # so that it cannot be written
    append(table, events, 4)
    path.rmdir()
    append(table, events, 5)
    append(table, events, 6)
    assert shown(reader(tmp_path)) == written(tmp_path)
    assert len(rows(tmp_path / "metrics.csv")) == 6


def test_hidden_columns_have_no_tag(table, tmp_path):
    EventFile(tmp_path / "tensorboard", {"train": table}, hidden=["error"])
    assert set(shown(reader(tmp_path))) == {"train/loss"}


def test_without_the_package_the_setting_is_refused_in_one_line(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.preflight.find_spec", lambda name: None)
    assert main(monkeypatch, command(packed, tmp_path / "run", "--tensorboard")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("run pip install 'alexnet-train[tensorboard]'")
    assert not (tmp_path / "run").exists()
