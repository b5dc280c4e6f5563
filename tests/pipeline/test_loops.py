"""The training loops of docs/loader.md change little, and continue with the same images after SIGKILL."""

import difflib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO, missing

DOCUMENT = REPO / "docs" / "loader.md"
BEFORE = Path(__file__).with_name("loops")  # the same loops with torch's DataLoader
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
LOOPS = {"train.py": 1, "train_torchrun.py": 2, "train_accelerate.py": 1}  # with the number of processes
STEPS = 9  # three epochs of 60 images, 20 in a batch
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def test_all_code_of_the_page_is_run_here():
    assert DOCUMENT.read_text().count("```python") == len(EXAMPLES)
    assert set(EXAMPLES) == {*LOOPS, "evaluate.py"}


@pytest.mark.parametrize("name", LOOPS)
def test_at_most_15_lines_of_a_loop_change(name):
    before = (BEFORE / name).read_text().splitlines()[1:]
    compile("\n".join(before), name, "exec")
    after = EXAMPLES[name].splitlines()
    changed = 0
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        changed += 0 if kind == "equal" else max(b - a, d - c)
    assert 5 <= changed <= 15


def start(name: str, folder: Path, data: Path, record: str, kill: int) -> int:
    """Run a loop in `folder`, and return its exit code. kill: the step before which it is killed, or −1."""
    script = folder / name
    script.write_text(EXAMPLES[name])
    launcher = [*TORCHRUN, str(LOOPS[name])] if LOOPS[name] > 1 else []
    recorder = [str(Path(__file__).with_name("recorded_loop.py")), str(folder / record), str(kill)]
    done = subprocess.run(
        [sys.executable, *launcher, *recorder, str(script), str(data), str(folder / "checkpoint.pt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert kill >= 0 or done.returncode == 0, done.stderr
    return done.returncode


def recorded(folder: Path, record: str, rank: int) -> dict[int, str]:
    """Return the hash of each batch by its step."""
    lines = (folder / f"{record}.{rank}").read_text().splitlines()
    return {int(step): content for step, content in map(str.split, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_is_killed_in_mid_epoch_continues_with_the_same_images(name, packed, tmp_path):
    if "accelerate" in name and importlib.util.find_spec("accelerate") is None:
        missing("accelerate", "make setup")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert start(name, whole, packed, "record", -1) == 0
    assert start(name, parts, packed, "first", 5) == (-signal.SIGKILL if LOOPS[name] == 1 else 1)
    assert start(name, parts, packed, "second", -1) == 0
    for rank in range(LOOPS[name]):
        expected = recorded(whole, "record", rank)
        first, second = recorded(parts, "first", rank), recorded(parts, "second", rank)
        assert sorted(expected) == list(range(STEPS))
        assert len(set(expected.values())) == STEPS
        assert sorted(first) == list(range(5))
        assert sorted(second) == list(range(4, STEPS))  # a checkpoint was saved after every second step
        assert {**first, **second} == expected
        assert first[4] == second[4]


def test_the_evaluation_counts_each_image(packed, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(EXAMPLES["evaluate.py"])
    done = subprocess.run(
        [sys.executable, str(script), str(packed)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["2"] * 10
