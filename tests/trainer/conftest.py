"""Fixtures for all tests of the trainer: a tiny run to compare with, and retries without pauses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import command, main


@pytest.fixture(scope="session")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder: 15 steps in 3 epochs, with a checkpoint every second step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert main(patch, command(packed, out, "--checkpoint-steps", "2")) == 0
    return out


@pytest.fixture(autouse=True)
def no_pauses() -> Iterator[None]:
    """Retry failed operations at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.retry.PAUSES", (0.0,) * 4)
        patch.setattr("pipeline.retry._EIO_PAUSES", (0.0,) * 2)
        yield
