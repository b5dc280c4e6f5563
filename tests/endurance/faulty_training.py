"""A small training job for faults.py, on storage where one call fails, when it starts or is resumed.

After each fault the same command runs again on sound storage. It must then reach the losses and weights of an
undisturbed run, and nothing that was saved before may be lost on the way.
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

# With the pictures that the tests draw and pack, five steps per epoch; a checkpoint every two.
SETTINGS = ["--recipe", "demo", "--crop", "67", "--width", "0.125", "--batch", "12", "--epochs", "2"]
SETTINGS += ["--log-every", "1", "--checkpoint-steps", "2", "--keep-checkpoints", "2", "--port", "0"]
SETTINGS += ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
STOPPED_AFTER = 7  # of ten steps, after which a run that will be resumed is stopped
_CPU = torch.device("cpu")
preload("trainer.train", "trainer.monitor.report", "tests.endurance.faulty_training")


def train(arguments: Sequence[str]) -> None:
    """Run alexnet-train in this process, without pauses."""
    from pipeline import retry
    from trainer import cli

    torch.set_num_threads(1)
    retry.PAUSES, retry._EIO_PAUSES = (0.0,) * 4, (0.0,) * 2  # type: ignore[assignment]
    sys.argv = ["alexnet-train", *arguments]
    cli.main()


def train_a_part(arguments: Sequence[str]) -> None:
    """Run alexnet-train in this process, and stop it with SIGTERM after STOPPED_AFTER steps."""
    from trainer.train import Trainer

    step = Trainer.train_step

    def train_step(self: Trainer, batches: Iterator) -> None:
        step(self, batches)
        if self.step == STOPPED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    train(arguments)


class Training:
    """A training run below `folder` whose calls fail from its start, or after it was resumed.

    folder: has a dataset in data/. continued: whether the failing calls are those of the resumed run.
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
        """Return a run's results: rows and weights."""
        rows = [{**row, "images_per_second": 0, "wait_ratio": 0} for row in self.run.metrics.rows()]
        return {"rows": rows, "evaluations": self.run.evaluations.rows()} | {
            kind: self._saved(kind) for kind in ("step", "best")
        }

    def _saved(self, kind: str) -> tuple[int, list[list[float]]] | None:
        """Return the step and some weights of the newest checkpoint of a kind."""
        state, _ = checkpoint.load(self.run.checkpoints, _CPU, kind)
        if state is None:
            return None
        return state["step"], [weights.flatten()[:100].tolist() for weights in state["model"].values()]

    def try_fault(self, fault: Fault) -> tuple[Outcome, list[str]]:
        """Run the job with a fault; return its outcome and the violations."""
        self._prepare()
        before = {kind: self._saved(kind) for kind in ("step", "best")}
        outcome = live(train, self.arguments, self.folder, fault)
        wrong = list(self._judge(outcome, fault, before))
        again = live(train, self.arguments, self.folder, None)
        if again.code:
            wrong.append(f"the same command again ends with {again.code}: {again.text}")
        elif "left out: " not in outcome.text:  # skipped samples stay damaged and change the losses
            wrong += self._differences("after the same command again")
        return outcome, wrong

    def _judge(self, outcome: Outcome, fault: Fault, before: dict[str, Any]) -> Iterator[str]:
        yield from outcome.crashes()
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
        """Return the differences from the undisturbed run."""
        try:
            content = self._content()
        except RunError as error:
            return [f"{error}, {when}"]
        return [f"other {name} {when}" for name in self.whole if content[name] != self.whole[name]]


def _judge_line(text: str, fault: Fault) -> Iterator[str]:
    """Check that an error is one line with file and reason, the last line from the command itself."""
    lines = [line for line in text.splitlines() if line.startswith("alexnet-train: ")]
    line = lines[-1] if lines else ""
    if len([other for other in lines if "cannot be locked" not in other]) != 1:
        yield f"{len(lines)} lines: {text}"
    # A missing file is reported in other words.
    if fault.error not in (SHORT, TWICE, "ENOENT") and os.strerror(getattr(errno, fault.error)) not in line:
        yield f"no reason: {text}"
    # The best checkpoint is named by its step.
    name = Path(fault.call.path).name.removeprefix(".").removesuffix(".partial").removesuffix(".link")
    if name.removeprefix("best-") not in line:
        yield f"no file: {text}"
