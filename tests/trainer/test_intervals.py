"""Log intervals on an asynchronous device, for which a CPU stands in."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.loader import train_loader
from tests.helpers import TINY, command, exact, main, main_without_more_images, rows
from trainer.monitor.meter import Meter
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World
from trainer.run import Run, RunError
from trainer.saver import Saver
from trainer.setting_sources import load_settings
from trainer.train import Trainer

NOTHING = torch.zeros(0, dtype=torch.float64)


@pytest.fixture
def asynchronous(monkeypatch):
    monkeypatch.setattr(World, "is_asynchronous", True)


def test_an_interval_that_is_read_later_keeps_its_values():
    meter = Meter(World(0, 1, 0, torch.device("cpu")))

    def step(loss: float, wrong: int) -> None:
        meter.begin_step()
        meter.end_step(torch.tensor(loss), torch.tensor(wrong), images=4)
        meter.add_wait(0.5)

    step(2.0, 3)
    step(4.0, 1)
    first = meter.harvest(torch.tensor([7.0], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64))
    step(1.0, 0)
    second = meter.harvest(NOTHING, NOTHING)
    interval, others = first()
    assert (interval.steps, interval.images, interval.loss, interval.error) == (2, 8, 3.0, 0.5)
    assert (interval.wait_seconds, interval.ready) == (1.0, 0)
    assert others == [7.0, 8.0]
    interval, others = second()
    assert (interval.steps, interval.images, interval.loss, interval.error) == (1, 4, 1.0, 0.0)
    assert others == []


def test_an_interval_is_reported_with_the_next_one_and_before_a_checkpoint(
    packed, tmp_path, asynchronous, monkeypatch
):
    reported = []

    def loader(*arguments, **options):
        for batch in train_loader(*arguments, **options):
            reported.append(len(rows(tmp_path / "run" / "metrics.csv")))
            yield batch

    monkeypatch.setattr("pipeline.training.train_loader", loader)
    arguments = command(packed, tmp_path / "run", "--epochs", "1", "--checkpoint-steps", "3")
    assert main(monkeypatch, arguments) == 0
    assert reported == [0, 0, 1, 3, 3]  # the index is the number of steps done
    assert [int(row["step"]) for row in rows(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4, 5]


def test_a_continued_run_leaves_the_same_files_as_an_uninterrupted_one(
    packed, whole, tmp_path, asynchronous, monkeypatch
):
    out = tmp_path / "run"
    assert main_without_more_images(monkeypatch, command(packed, out)) == 1
    assert [int(row["step"]) for row in rows(out / "metrics.csv")] == list(range(1, 8))
    assert main(monkeypatch, command(packed, out)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


class NoWait(TorchDispatchMode):
    """Raises an error if Python reads a tensor's value, which would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.name() not in {"aten::_local_scalar_dense", "aten::nonzero"}
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_no_step_and_no_interval_waits_for_the_device(packed, tmp_path, asynchronous, on_nan):
    settings = load_settings(["--data", str(packed), *TINY, "--on-nan", on_nan])
    alone = World(0, 1, 0, torch.device("cpu"))
    trainer = Trainer(settings, Run(tmp_path / "run"), alone, Metrics(), port=None)
    trainer.run.folder.mkdir()
    batches = trainer.batches()
    trainer.train_step(batches)
    with NoWait():
        for _ in range(3):
            trainer.train_step(batches)
            assert trainer.log() == (False, False)


class OtherProcess:
    """Adds what another process contributes to the sums of all processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.not_finite = self.stop = self.save = False
        monkeypatch.setattr(World, "all_reduce", self.all_reduce)

    def all_reduce(self, values: Tensor) -> Tensor:
        loss, wrong = 0.0, 0.0
        return values + torch.tensor([loss, wrong, self.not_finite, self.stop, self.save])


@pytest.fixture
def trainer(packed, tmp_path):
    settings = load_settings(["--data", str(packed), *TINY])
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    trainer = Trainer(settings, run, World(0, 1, 0, torch.device("cpu")), Metrics(), port=None)
    trainer.intervals.world = World(0, 2, 0, torch.device("cpu"))
    return trainer


def next_interval(trainer: Trainer) -> tuple[bool, bool]:
    trainer.train_step(trainer.batches())
    return trainer.log()


@pytest.mark.parametrize("vote", ["stop", "save"])
def test_what_one_process_wants_all_do_at_the_same_step(trainer, monkeypatch, vote):
    other, agreed = OtherProcess(monkeypatch), (vote == "stop", vote == "save")
    assert next_interval(trainer) == (False, False)
    setattr(other, vote, True)
    assert next_interval(trainer) == agreed
    setattr(other, vote, False)
    assert next_interval(trainer) == (False, False)


@pytest.mark.parametrize("vote", ["stop", "save"])
def test_votes_on_gpus_are_known_with_the_next_interval(trainer, asynchronous, monkeypatch, vote):
    other, agreed = OtherProcess(monkeypatch), (vote == "stop", vote == "save")
    setattr(other, vote, True)
    assert next_interval(trainer) == (False, False)
    setattr(other, vote, False)
    trainer.intervals.report()  # as before a checkpoint
    assert next_interval(trainer) == agreed
    assert next_interval(trainer) == (False, False)


def test_a_checkpoint_that_is_due_on_gpus_is_saved_once(trainer, asynchronous, monkeypatch):
    OtherProcess(monkeypatch)
    monkeypatch.setattr(Saver, "is_due", True)
    assert next_interval(trainer) == (False, False)
    assert next_interval(trainer) == (False, True)
    monkeypatch.setattr(Saver, "is_due", False)  # it is being saved
    assert next_interval(trainer) == (False, False)


def test_numbers_that_are_not_finite_in_another_process_end_this_one_too(trainer, monkeypatch):
    """Otherwise, this one would wait for it. Statistics of BatchNorm, for example, are a process's own."""
    other = OtherProcess(monkeypatch)
    assert next_interval(trainer) == (False, False)
    other.not_finite = True
    with pytest.raises(RunError, match="the weights are no longer finite"):
        next_interval(trainer)
