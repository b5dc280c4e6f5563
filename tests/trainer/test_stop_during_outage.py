"""A run that is asked to stop while it waits for a bucket saves and stops at once."""

import os
import signal
import time

import pytest

from tests.bucket import serving
from tests.helpers import command, exact, main
from trainer.train import Trainer


@pytest.mark.timeout(300)  # less than an outage may last
@pytest.mark.parametrize(
    ("split", "steps", "said"),
    [("train", 0, "stopped before the first step"), ("val", 5, "saved after step 5")],
)
def test_a_signal_ends_the_wait_for_storage(packed, whole, tmp_path, monkeypatch, capsys, split, steps, said):
    """The shards of a split cannot be fetched when the first batch or the first evaluation needs them."""
    out, wait_on, asked = tmp_path / "run", Trainer._wait_on, []

    def interrupted(self) -> None:
        if not asked and self.step == steps and signal.getsignal(signal.SIGTERM) == self.stop._record:
            os.kill(os.getpid(), signal.SIGTERM)
            asked.append(time.monotonic())
        wait_on(self)

    with serving(packed) as bucket:
        bucket.fault = lambda handler, name, part: (
            name.startswith(split) and name.endswith(".tar") and (handler.refuse(503) or True)
        )
        arguments = [*command(packed, out), "--cache", str(tmp_path / "cache")]
        arguments[arguments.index("--data") + 1] = bucket.url
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_wait_on", interrupted)
            assert main(patch, arguments) == 143
        assert time.monotonic() - asked[0] < 60
        assert f"SIGTERM: {said}; run the same command again to continue" in capsys.readouterr().out
        bucket.fault = lambda handler, name, part: False
        assert main(monkeypatch, arguments) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
