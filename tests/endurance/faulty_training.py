"""A small training for faults.py: on storage of which one call fails, from its start or continued.

After each fault the same command is given again on sound storage. Whatever happened, it must come to the
losses and weights of a run that nothing disturbed, and what was saved before must not be lost meanwhile.
"""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.endurance.faulty_storage import SHORT, TWICE, Fault
from tests.endurance.jobs import Outcome, live, preload
from trainer import checkpoint
from trainer.run import Run, RunError

# Of the drawn pictures that the tests pack: five steps an epoch, the last with what a checkpoint is for.
SETTINGS = ["--recipe", "demo", "--crop", "67", "--width", "0.125", "--batch", "12", "--epochs", "2"]
SETTINGS += ["--log-every", "1", "--checkpoint-steps", "2", "--keep-checkpoints", "2", "--port", "0"]
SETTINGS += ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
STOPPED_AFTER = 7  # of ten steps: then the first life of a run that is to be continued ends
_CPU = torch.device("cpu")
preload("trainer.train", "trainer.monitor.report", "tests.endurance.faulty_training")


def train(arguments: Sequence[str]) -> None:
    """alexnet-train in this process, without pauses."""
    from pipeline import retry
    from trainer import cli

    torch.set_num_threads(1)
    retry.PAUSES, retry._EIO_PAUSES = (0.0,) * 4, (0.0,) * 2  # type: ignore[assignment]
    sys.argv = ["alexnet-train", *arguments]
    cli.main()


def train_a_part(arguments: Sequence[str]) -> None:
    """The same, asked to stop by SIGTERM."""
    from trainer.train import Trainer

    step = Trainer.train_one

    def train_one(self: Trainer, batches: Iterator) -> None:
        step(self, batches)
        if self.step == STOPPED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_one = train_one  # type: ignore[method-assign]
    train(arguments)


class Training:
    """A run below `folder`, whose calls fail from its start, or when it is continued.

    folder: has a dataset in data/. continued: whether the calls are those of its second life.
    """

    def __init__(self, folder: Path, continued: bool):
        self.folder, self.run, self.begun = folder, Run(folder / "run"), folder / "begun"
        self.arguments = ["--data", str(folder / "data"), "--out", str(self.run.folder), *SETTINGS]
        if continued:
            assert live(train_a_part, self.arguments, folder, None).code == 128 + signal.SIGTERM
            self.run.folder.rename(self.begun)
            self._prepare()
        undisturbed = live(train, self.arguments, folder, None)
        assert undisturbed.code == 0, undisturbed.text
        self.calls, self.whole = undisturbed.calls, self._content()

    def _prepare(self) -> None:
        shutil.rmtree(self.run.folder, ignore_errors=True)
        if self.begun.exists():
            shutil.copytree(self.begun, self.run.folder)

    def _content(self) -> dict[str, Any]:
        """What a run comes to: rows and weights."""
        rows = [{**row, "images_per_second": 0, "wait_ratio": 0} for row in self.run.metrics.rows()]
        return {"rows": rows, "evaluations": self.run.evaluations.rows()} | {
            kind: self._saved(kind) for kind in ("step", "best")
        }

    def _saved(self, kind: str) -> tuple[int, list[list[float]]] | None:
        """The newest of a kind: its step, and some of its weights."""
        state, _ = checkpoint.load(self.run.checkpoints, _CPU, kind)
        if state is None:
            return None
        return state["step"], [weights.flatten()[:100].tolist() for weights in state["model"].values()]

    def try_fault(self, fault: Fault) -> tuple[Outcome, list[str]]:
        """What came of it, and what should not have."""
        self._prepare()
        before = {kind: self._saved(kind) for kind in ("step", "best")}
        outcome = live(train, self.arguments, self.folder, fault)
        wrong = list(self._judge(outcome, fault, before))
        again = live(train, self.arguments, self.folder, None)
        if again.code:
            wrong.append(f"the same command again ends with {again.code}: {again.text}")
        elif "left out: " not in outcome.text:  # for damage that stays, which changes the losses
            wrong += self._differences("after the same command again")
        return outcome, wrong

    def _judge(self, outcome: Outcome, fault: Fault, before: dict[str, Any]) -> Iterator[str]:
        if outcome.code < 0:
            yield f"ended by {signal.Signals(-outcome.code).name}: {outcome.text}"
        if "Traceback" in outcome.text:
            yield f"a traceback: {outcome.text}"
        for kind, saved in before.items():
            try:
                now = self._saved(kind)
            except RunError as error:
                yield f"{kind}: {error}"
                continue
            if saved and (now is None or now[0] < saved[0]):
                yield f"{kind} {saved[0]} is lost, and there is {now and now[0]}"
        if outcome.code == 0 and "left out: " not in outcome.text:
            yield from self._differences("with code 0")
            if not self.run.is_finished:
                yield "code 0 without a report"
        if outcome.code > 0:
            yield from _judge_line(outcome.text, fault)

    def _differences(self, when: str) -> list[str]:
        """From the run that nothing disturbed."""
        try:
            content = self._content()
        except RunError as error:
            return [f"{error}, {when}"]
        return [f"other {name} {when}" for name in self.whole if content[name] != self.whole[name]]


def _judge_line(text: str, fault: Fault) -> Iterator[str]:
    """An error is one line with the file and the reason, the last that the command says of itself."""
    lines = [line for line in text.splitlines() if line.startswith("alexnet-train: ")]
    line = lines[-1] if lines else ""
    if len([other for other in lines if "cannot be locked" not in other]) != 1:
        yield f"{len(lines)} lines: {text}"
    # That a file is missing is said in other words.
    if fault.error not in (SHORT, TWICE, "ENOENT") and os.strerror(getattr(errno, fault.error)) not in line:
        yield f"no reason: {text}"
    # The best is named by its step.
    name = Path(fault.call.path).name.removeprefix(".").removesuffix(".partial").removesuffix(".link")
    if name.removeprefix("best-") not in line:
        yield f"no file: {text}"
