"""The plots of benchmark records: what is drawn, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import REPO
from tools.draw_benchmarks import main, read_records, spread


def write(path: Path, *records: tuple[str, dict]) -> None:
    lines = (json.dumps({"command": command, "images_per_second": found}) for command, found in records)
    path.write_text("\n".join(lines) + "\n")


def test_the_newest_record_of_each_stage_and_sweep_is_drawn(tmp_path):
    old, new = {"ours": [1.0], "theirs": [2.0]}, {"ours": [3.0, 5.0, 4.0], "theirs": [2.0, 2.0, 2.0]}
    swept = {"threads 1": [1.0], "threads 2": [2.0]}
    write(tmp_path / "2026-11-21.jsonl", ("bench.py all", {"read": old, "loader": old}))
    sweep = ("bench.py loader --sweep threads 1 2", {"loader": swept | {"threads 4": []}})
    write(
        tmp_path / "2026-11-22.jsonl",
        ("bench.py loader", {"loader": old}),
        ("bench.py loader", {"loader": new}),
        ("bench.py read", {"read": {}}),  # of which all failed
        sweep,
    )
    assert read_records(tmp_path) == ({"read": old, "loader": new}, {"loader by threads": swept})
    command = [sys.executable, "tools/draw_benchmarks.py", tmp_path]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("stages.png", "sweeps.png"):
        assert str(tmp_path / name) in done.stdout
        assert Image.open(tmp_path / name).width == 1100


def test_error_bars_reach_from_minimum_to_maximum():
    assert spread([5.0, 1.0, 4.0]) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON", "line 1, is not a record"), ('{"a": 1}', "line 1"), (None, "has no records")],
)
def test_records_that_cannot_be_drawn_are_refused_in_one_line(content, message, tmp_path, call):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    done = call(main, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
