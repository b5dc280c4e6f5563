"""The benchmark: its arithmetic, its records, and a real run of each stage."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch

from tests.helpers import REPO
from tools import bench


def test_candidates_run_in_turn_after_a_warm_up():
    order = []

    def candidate(name: str):
        return lambda: order.append(name) or float(len(order))

    rates, errors = bench.in_turn({"a": candidate("a"), "b": candidate("b")}, runs=2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert errors == {}


def failing(turn: int, error: Exception):
    """Return a candidate that fails in the given turn, counted from 1, and returns 1.0 before it."""
    turns = itertools.count(1)

    def run() -> float:
        if next(turns) == turn:
            raise error
        return 1.0

    return run


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nleft"), ValueError("x"), OSError("x")])
def test_a_candidate_that_fails_has_no_figures_and_the_others_continue(turn, error):
    stage = {"a": failing(0, error), "b": failing(turn, error), "c": failing(0, error)}
    figures, errors = bench.in_turn(stage, runs=3)
    assert figures == {"a": [1.0] * 3, "b": [], "c": [1.0] * 3}
    assert list(errors) == ["b"]
    assert list(stage) == ["a", "c"]  # so its memory can be freed
    failed, first, third = bench.table("model", figures, errors)
    assert failed.endswith(f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
    assert first.startswith("model             a ")
    assert "a is 1.00 × this" in third


def test_without_the_first_candidate_there_are_figures_but_no_ratios():
    figures = {"ours": [], "theirs": [5.0]}
    [line] = bench.table("model", figures, {})
    assert "5.0 images/s" in line
    assert "×" not in line


@pytest.mark.parametrize(("limit", "runs"), [(math.inf, 9), (50, 4), (49, 3), (1, 1)])
def test_a_limit_stops_whole_rounds_after_the_first(limit, runs, monkeypatch):
    now = 0.0

    def candidate() -> float:
        nonlocal now
        now += 5.0
        return now

    monkeypatch.setattr("tools.bench.time.monotonic", lambda: now)
    figures, _ = bench.in_turn({"a": candidate, "b": candidate}, 9, limit)
    assert {name: len(values) for name, values in figures.items()} == {"a": runs, "b": runs}


def test_table_has_medians_and_ratios_of_neighbouring_runs():
    first, second = bench.table("loader", {"ours": [10.0, 20.0, 40.0], "theirs": [5.0, 5.0, 20.0]}, {})
    assert "20.0 images/s" in first
    assert "10.0 to 40.0" in first
    assert "5.0 images/s" in second
    assert "2.00 ×" in second  # of 2, 4 and 2


QUICK = ("--runs", "1", "--seconds", "0.1")
# A narrow net on the CPU, whose checkpoints have 2 MB; those of the paper's net are 100 times as large.
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "pack"], "pack needs --input: a folder of images to pack"),
        (["read", "peers"], "peers needs --loader-peers"),
        (["read", "memory"], "memory needs a GPU"),
        (["read", "--record", "."], "Is a directory: '.'"),
        (["read", "--trace", "."], "Is a directory: '.'"),
    ],
)
def test_what_cannot_succeed_is_refused_before_anything_is_measured(packed, call, arguments, message):
    done = call(bench.main, *arguments, "--data", packed, *QUICK, *SETTINGS)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


def test_a_setting_is_swept_by_turns(packed, tmp_path, call):
    records = tmp_path / "runs" / "records.jsonl"
    arguments = ("loader", "--data", str(packed), *QUICK, "--record", str(records))
    done = call(bench.main, *arguments, "--sweep", "threads", "1", "2", *SETTINGS)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [json.loads(line) for line in records.read_text().splitlines()] == [record]
    assert list(record["images_per_second"]["loader"]) == ["threads 1", "threads 2"]


@pytest.fixture
def broken(monkeypatch):
    """The second candidate of `read` and all of `loader` run out of memory."""
    from tools.benchmarks.stages import Stages

    read = Stages.read

    def fail(*_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Stages, "read", lambda self: read(self) | {"DALI's reader": fail})
    monkeypatch.setattr(Stages, "loader", fail)


def test_figures_and_failures_are_recorded_after_each_stage(packed, tmp_path, call, broken):
    records = tmp_path / "records.jsonl"
    stages = ("read", "loader", "train")
    done = call(bench.main, *stages, "--data", packed, *QUICK, "--record", records, *SETTINGS)
    assert done.returncode == 1
    assert done.stderr == ""
    whole = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [list(line["took_seconds"]) for line in lines] == [[stage] for stage in stages]
    read, loader, train = (line["images_per_second"] for line in lines)
    assert whole["images_per_second"] == read | loader | train
    assert {name: len(runs) for name, runs in read["read"].items()} == {
        "plan": 1,
        "DALI's reader": 0,
        "DALI's, mapped": 1,
    }
    assert loader == {"loader": {}}
    assert all(len(runs) == 1 for runs in train["train"].values())
    why = "OutOfMemoryError: no memory left"
    assert whole["failed"] == {"read": {"DALI's reader": why}, "loader": {"all": why}}
    assert "failed" not in lines[2]


def test_a_killed_stage_keeps_the_records_before_it(packed, tmp_path, call, monkeypatch):
    from tools.benchmarks.stages import Stages

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "loader", killed)
    records = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        call(bench.main, "read", "loader", "--data", packed, *QUICK, "--record", records, *SETTINGS)
    [line] = records.read_text().splitlines()
    assert list(json.loads(line)["images_per_second"]) == ["read"]


def test_decoding_is_tuned_once_for_all_values_of_a_sweep(packed, call, monkeypatch):
    from tools.benchmarks import stages

    measured = []

    def tune(decoding, settings, *_):
        if not settings.threads or settings.hw_decoder_load is None:
            measured.append(settings.batch)
            decoding = dataclasses.replace(decoding, threads=3, hw_decoder_load=0.25)
        return decoding, []

    monkeypatch.setattr(stages, "tune", tune)
    found = []
    monkeypatch.setattr(
        stages.Stages, "loader", lambda self: {"": lambda: found.append(self.decoding) or 1.0}
    )
    arguments = ("loader", "--data", packed, *QUICK, *SETTINGS)
    assert call(bench.main, *arguments, "--sweep", "batch", "4", "8").returncode == 0
    assert call(bench.main, *arguments, "--sweep", "threads", "1", "2").returncode == 0
    assert measured == [4, 4]
    assert {(decoding.threads, decoding.hw_decoder_load) for decoding in found[:4]} == {(3, 0.25)}
    assert [decoding.threads for decoding in found[4:]] == [1, 2, 1, 2]
    assert {decoding.hw_decoder_load for decoding in found[4:]} == {0.25}


def test_the_form_of_convolutions_is_chosen_once_when_needed_and_recorded(
    packed, tmp_path, call, monkeypatch
):
    from tools.benchmarks import stages

    looked = []
    monkeypatch.setattr(
        stages, "fastest_form", lambda settings, _: (looked.append(settings.batch) or "towers", [])
    )
    records = tmp_path / "records.jsonl"
    arguments = ("--data", packed, *QUICK, *SETTINGS, "--record", records)
    assert call(bench.main, "read", "train", *arguments).returncode == 0
    assert [json.loads(line)["convolutions"] for line in records.read_text().splitlines()] == [
        "auto",
        "towers",
    ]
    assert looked == [4]
    assert call(bench.main, "train", *arguments, "--sweep", "batch", "2", "3").returncode == 0
    assert looked == [4, 4]
    assert json.loads(records.read_text().splitlines()[-1])["convolutions"] == "towers"


@pytest.fixture
def loaders(monkeypatch):
    """`loader` has three runs whose figures depend on the batch size; its other candidate gives 1.0."""
    from tools.benchmarks.stages import Stages

    figures = {4: (2.0, 2.0, 2.0), 32: (0.7, 0.8, 0.9), 128: (0.9, 0.95, 1.05)}

    def loader(self):
        warm_up_and_runs = iter((0.0, *figures[self.settings.batch]))
        return {"loader": lambda: next(warm_up_and_runs), "DALI's reader": lambda: 1.0}

    monkeypatch.setattr(Stages, "loader", loader)


WITHOUT_BATCH = [*SETTINGS[:2], *SETTINGS[4:]]


def test_a_stage_is_measured_and_judged_at_two_batches(packed, tmp_path, call, loaders):
    records = tmp_path / "records.jsonl"
    done = call(bench.main, "loader", "--data", packed, "--runs", "3", "--record", records, *WITHOUT_BATCH)
    labels = ["loader, batch 32", "loader, batch 128"]
    gate = {"goal": 1.0, "at_most": False, "over": ["DALI's reader"]}
    gates = [
        gate | {"ratio": 0.8, "interval": [0.7, 0.9], "verdict": "missed"},
        gate | {"ratio": 0.95, "interval": [0.9, 1.05], "verdict": "undecided"},
    ]
    *lines, last = done.stdout.splitlines()
    record = json.loads(last)
    assert list(record["images_per_second"]) == list(record["took_seconds"]) == labels
    assert record["gates"] == {labels[0]: [gates[0]], labels[1]: [gates[1]]}
    alone = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(line["batch"], line["gates"]) for line in alone] == [
        (32, {labels[0]: [gates[0]]}),
        (128, {labels[1]: [gates[1]]}),
    ]
    said = [line.split(" gate: ") for line in lines if " gate: " in line]
    assert [(label.strip(), line.rpartition(": ")[2]) for label, line in said] == [
        (labels[0], "MISSED"),
        (labels[1], "undecided; more --runs may decide it"),
    ]


@pytest.mark.parametrize("batch", [("--batch", "4"), ("--batch=4",)])
def test_a_given_batch_size_is_the_only_one_measured(batch, packed, call, loaders):
    done = call(bench.main, "loader", "--data", packed, "--runs", "3", *WITHOUT_BATCH, *batch)
    record = json.loads(done.stdout.splitlines()[-1])
    assert list(record["images_per_second"]) == ["loader"]
    assert [gate["verdict"] for gate in record["gates"]["loader"]] == ["passed"]


@pytest.mark.parametrize(
    ("batch", "gates", "code"),
    [(4, ["--gates"], 0), (128, ["--gates"], 0), (32, ["--gates"], 1), (32, [], 0)],
)
def test_only_a_missed_gate_changes_the_exit_code_and_only_on_request(
    batch, gates, code, packed, call, loaders
):
    arguments = ("loader", "--data", packed, "--runs", "3", *WITHOUT_BATCH, "--batch", batch)
    assert call(bench.main, *arguments, *gates).returncode == code


@pytest.mark.parametrize("wrong", [("--runs", "0"), ("--seconds", "nan"), ("--seconds", "inf")])
def test_runs_and_seconds_must_be_positive(wrong, call):
    done = call(bench.main, "read", *wrong)
    assert done.returncode == 2
    assert f"argument {wrong[0]}: {wrong[1]} is not a " in done.stderr


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
def test_an_impossible_measurement_is_refused_in_one_line(arguments, packed, call):
    data = () if "--data" in arguments else ("--data", packed)
    done = call(bench.main, *arguments, *data, *SETTINGS)
    assert done.returncode != 0
    assert done.stderr.startswith("bench: ")
    assert done.stderr.count("\n") == 1
