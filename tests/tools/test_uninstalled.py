"""A clone works if only its dependencies are installed."""

import os
import re
import subprocess
import sys

import pytest

from pipeline import __version__
from pipeline.packing import shard
from tests.helpers import REPO
from trainer.environment import environment

COMMANDS = sorted(
    str(path.relative_to(REPO)) for path in REPO.glob("tools/*.py") if "args(" in path.read_text()
)


@pytest.mark.parametrize(
    "command",
    [*([name] for name in COMMANDS), ["-m", "trainer.cli"], ["-m", "tools.command"], ["-m", "tools.package"]],
    ids=" ".join,
)
def test_help_works_in_a_clone(command):
    """Use -S, which ignores the .pth files by which site-packages may point to the clone."""
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": packages}
    command = [sys.executable, "-S", *command, "--help"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_no_process_is_started_by_a_name_that_only_an_installation_has():
    for folder in ("model", "pipeline", "tools", "trainer"):
        for path in (REPO / folder).rglob("*.py"):
            assert not re.search(r"""["']alexnet_train["']""", path.read_text()), path


def test_records_have_the_version_of_the_code_even_if_another_one_is_installed(monkeypatch):
    monkeypatch.setattr("trainer.environment.version", lambda _package: "0.0.1")
    assert shard.versions()["alexnet-train"] == __version__
    assert environment("cpu")["alexnet-train"] == __version__
