"""The instrument: its arithmetic, and that each stage runs and ends in JSON."""

import json
import subprocess
import sys

import pytest

from tests.helpers import REPO
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


def test_a_gate_compares_runs_that_stood_side_by_side():
    figures = {
        "ours": [30.0, 20.0, 40.0],
        "a": [10.0, 10.0, 10.0],
        "b": [5.0, 20.0, 80.0],
        "c": [1.0, 1.0, 1.0],
    }
    assert bench.Gate("x", 1.0, ("a", "b")).reached(figures) == 1.0  # of 3, 1 and .5
    assert bench.Gate("x", 1.0, ("a", "b"), pick=min).reached(figures) == 4.0  # of 6, 2 and 4
    assert bench.Gate("x", 1.0).reached(figures) == 30.0
    assert bench.Gate("x", 1.0, ("not measured",)).reached(figures) is None


@pytest.mark.parametrize(("ours", "passed"), [(2.0, True), (0.95, True), (0.85, False)])
def test_a_gate_is_missed_by_more_than_noise(ours, passed):
    lines, good = bench.judge({"loader": {"loader": [ours], "DALI's reader": [1.0]}}, "cpu")
    assert good == passed
    assert [line.rsplit(": ")[-1] for line in lines] == ["passed" if passed else "MISSED"]


def test_amounts_are_asked_of_a_gpu_alone():
    figures = {"model": {"bf16": [70_000.0]}}
    assert bench.judge(figures, "cpu") == ([], True)
    assert bench.judge(figures, "cuda")[1] is False
    assert bench.judge({"model": {"bf16": [90_000.0]}}, "cuda")[1] is True


def test_images_of_full_size_have_a_gate_of_their_own():
    figures = {"loader": {"loader": [20_000.0], "DALI's reader": [20_000.0]}}
    assert bench.judge(figures, "cuda", "256")[1] is False
    assert bench.judge(figures, "cuda", "original")[1] is True


@pytest.mark.parametrize(("seconds", "passed"), [(20.0, True), (26.0, True), (30.0, False)])
def test_some_gates_are_upper_limits(seconds, passed):
    [line], good = bench.judge({"start": {"warm": [seconds]}}, "cuda")
    assert good == passed
    assert "at most 25" in line


QUICK = ("--runs", "1", "--seconds", "0.1")
# A narrow net on the CPU: checkpoints have 2 MB where the paper's net has 100 times as much.
SETTINGS = ("--crop", "67", "--batch", "4", "--recipe", "demo")
SETTINGS += ("--width", "0.125", "--device", "cpu", "--precision", "fp32")


@pytest.mark.slow
def test_every_stage_measures_and_the_last_line_is_json(packed, pictures, tmp_path):
    trace = tmp_path / "trace.json"
    command = [sys.executable, "tools/bench.py", "all", "--data", packed, "--input", pictures, *QUICK]
    command += ["--trace", trace, *SETTINGS]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    measured = record["images_per_second"]
    assert list(measured) == ["read", "loader", "model", "train", "pack"]
    assert list(measured["train"]) == ["train", "loader alone", "model alone"]
    assert list(record["seconds"]["save"]) == ["stall", "until on the disk", "torch.save in line"]
    for stage in (*measured.values(), *record["seconds"].values()):
        for values in stage.values() if isinstance(stage, dict) else [stage]:
            assert len(values) == 1
            assert values[0] > 0
    assert (record["batch"], record["crop"]) == (4, 67)
    assert {"cpu", "cores", "torch", "commit"} <= record["environment"].keys()
    assert any("conv" in str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"])


def test_a_setting_is_swept_by_turns(packed, tmp_path, call):
    records = tmp_path / "runs" / "records.jsonl"
    arguments = ("loader", "--data", str(packed), *QUICK, "--record", str(records))
    done = call(bench.main, *arguments, "--sweep", "threads", "1", "2", *SETTINGS)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [json.loads(line) for line in records.read_text().splitlines()] == [record]
    assert list(record["images_per_second"]["loader"]) == ["threads 1", "threads 2"]


def test_a_missed_gate_is_an_exit_code_where_it_is_asked_for(packed, monkeypatch, call):
    monkeypatch.setattr(bench, "GATES", (bench.Gate("read", 1e9),))
    for gates, code in (((), 0), (("--gates",), 1)):
        done = call(bench.main, "read", "--data", packed, *SETTINGS, *QUICK, *gates)
        assert done.returncode == code
        assert "MISSED" in done.stdout


@pytest.mark.parametrize("wrong", [("--runs", "0"), ("--seconds", "nan"), ("--seconds", "inf")])
def test_a_run_has_a_length_and_there_is_one(wrong, call):
    done = call(bench.main, "read", *wrong)
    assert done.returncode == 2
    assert f"argument {wrong[0]}: {wrong[1]} is not a number" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["loader", "--data", "/nowhere"],
        ["loader", "--bach", "3"],
        ["loader", "--sweep", "bach", "3"],
        ["loader", "--sweep", "threads", "-1"],
        ["pack"],
        ["peers"],
        ["memory"],
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, packed, call):
    data = () if "--data" in arguments else ("--data", packed)
    done = call(bench.main, *arguments, *data, *SETTINGS)
    assert done.returncode != 0
    assert done.stderr.startswith("bench: ")
    assert done.stderr.count("\n") == 1
