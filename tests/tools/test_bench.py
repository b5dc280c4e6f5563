"""The instrument: its arithmetic, and that each stage runs and ends in JSON."""

import json
import subprocess
import sys

import pytest

from tools import bench


def test_contestants_run_by_turns_after_a_warm_up():
    order = []

    def contestant(name: str):
        return lambda: order.append(name) or float(len(order))

    rates = bench.by_turns({"a": contestant("a"), "b": contestant("b")}, runs=2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_table_has_medians_and_ratios_of_neighbouring_runs():
    first, second = bench.table("loader", {"ours": [10.0, 20.0, 40.0], "theirs": [5.0, 5.0, 20.0]})
    assert "20.0 images/s" in first
    assert "10.0 to 40.0" in first
    assert "5.0 images/s" in second
    assert "2.00 ×" in second  # of 2, 4 and 2


def test_every_stage_measures_and_the_last_line_is_json(packed, pictures):
    small = ["--crop", "67", "--batch", "4", "--recipe", "demo", "--runs", "1", "--seconds", "0.1"]
    command = ["tools.bench", "all", "--data", str(packed), "--input", str(pictures), *small]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert list(record["images_per_second"]) == ["read", "loader", "model", "train", "pack"]
    assert list(record["images_per_second"]["train"]) == ["train", "loader alone", "model alone"]
    for stage in record["images_per_second"].values():
        for rates in stage.values():
            assert len(rates) == 1
            assert rates[0] > 0
    assert (record["batch"], record["crop"]) == (4, 67)
    assert {"cpu", "cores", "torch", "commit"} <= record["environment"].keys()


@pytest.mark.parametrize("arguments", [["loader", "--data", "/nowhere"], ["loader", "--bach", "3"], ["pack"]])
def test_what_cannot_be_measured_is_one_line(arguments, packed):
    if arguments == ["pack"]:
        arguments = ["pack", "--data", str(packed), "--crop", "67"]
    command = [sys.executable, "-m", "tools.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("bench: ")
    assert done.stderr.count("\n") == 1
