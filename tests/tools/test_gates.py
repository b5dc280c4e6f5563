"""The gates of the benchmark, judged on invented runs whose medians and intervals were computed by hand."""

import random

import pytest

from tools.benchmarks import gates
from tools.benchmarks.gates import GATES, Gate, judge

CPU = {"device": "cpu", "geometry": "256", "precision": "fp32", "amx": False}
GPU = CPU | {"device": "cuda", "precision": "bf16"}


def judged(gate: Gate, **figures: list[float]):
    [judgement] = judge(gate.stage, figures, CPU, [gate])
    return judgement


def test_a_gate_compares_runs_of_the_same_round():
    figures = {
        "ours": [30.0, 20.0, 40.0],
        "a": [10.0, 10.0, 10.0],
        "b": [5.0, 20.0, 80.0],
        "c": [1.0, 1.0, 1.0],
    }
    assert judged(Gate("x", 1.0, ("a", "b")), **figures).reached == [3.0, 1.0, 0.5]
    assert judged(Gate("x", 1.0, ("a", "b"), pick=min), **figures).reached == [6.0, 2.0, 4.0]
    assert judged(Gate("x", 1.0), **figures).reached == [30.0, 20.0, 40.0]


@pytest.mark.parametrize(
    ("ours", "verdict", "of"),
    [
        ([1.2, 0.9, 1.1], "passed", "1.100 (95 %: 0.900 to 1.200)"),
        ([1.0, 0.9, 1.1], "passed", "1.000 (95 %: 0.900 to 1.100)"),  # equal to the goal
        ([0.99, 0.9, 1.1], "undecided", "0.990 (95 %: 0.900 to 1.100)"),
        ([0.95, 1.0], "undecided", "0.975 (95 %: 0.950 to 1.000)"),
        ([0.98, 0.99, 0.97], "missed", "0.980 (95 %: 0.970 to 0.990)"),
        ([0.999], "missed", "0.999 (95 %: 0.999 to 0.999)"),  # there is no tolerance
    ],
)
def test_a_gate_is_passed_undecided_or_missed_and_its_line_says_so(ours, verdict, of):
    judgement = judged(Gate("x", 1.0, ("theirs",)), ours=ours, theirs=[1.0] * len(ours))
    assert judgement.verdict == verdict
    line = judgement.line("images/s")
    assert line.startswith(f"{of} × theirs; at least 1: ")
    assert verdict in line.rpartition(": ")[2].lower()


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ([24.0, 20.0, 30.0], "passed"),
        ([25.0, 20.0, 30.0], "passed"),
        ([26.0, 25.0, 30.0], "undecided"),
        ([26.0, 25.5, 27.0], "missed"),
    ],
)
def test_some_gates_are_upper_limits(seconds, verdict):
    judgement = judged(Gate("x", 25, at_most=True), ours=seconds)
    assert judgement.verdict == verdict
    assert " s; at most 25: " in judgement.line("s")


@pytest.mark.parametrize(("runs", "interval"), [(5, (1.0, 5.0)), (9, (2.0, 8.0)), (13, (4.0, 10.0))])
def test_the_interval_is_the_range_of_five_runs_and_narrower_for_more(runs, interval):
    """The median of n resampled runs is among the k lowest runs if at least (n + 1)/2 of n draws are.

    The probability is 5.8 % for the lowest of 5; .1 and 3.0 % for the one and two lowest of 9; 1.6 and 7.1 %
    for the three and four lowest of 13. The interval begins at the first k whose probability exceeds 2.5 %.
    """
    shuffled = [float(1 + 2 * number % runs) for number in range(runs)]
    assert judged(Gate("x", 1.0), ours=shuffled).interval == interval


def test_the_interval_does_not_depend_on_earlier_random_draws(monkeypatch):
    monkeypatch.setattr(gates, "RESAMPLES", 50)  # so few that the percentiles depend on each draw
    runs = random.Random(0)
    ours = [runs.random() for _ in range(20)]
    assert len({judged(Gate("x", 1.0), ours=ours).interval for _ in range(10)}) == 1


def test_unmeasured_candidates_are_named_but_not_compared():
    gate = Gate("x", 1.1, ("ffcv", "dali", "other"))
    judgement = judged(gate, ours=[2.0], ffcv=[], dali=[1.0], other=[0.5])
    assert judgement.record() == {
        "goal": 1.1,
        "at_most": False,
        "over": ["dali", "other"],
        "ratio": 2.0,
        "interval": (2.0, 2.0),
        "verdict": "passed",
    }
    assert "× the fastest of dali, other (not measured: ffcv); " in judgement.line("images/s")


@pytest.mark.parametrize("figures", [{}, {"ours": [], "theirs": [1.0]}, {"ours": [1.0], "theirs": []}])
def test_nothing_is_judged_without_figures_of_both_sides(figures):
    assert list(judge("x", figures, CPU, [Gate("x", 1.0, ("theirs",))])) == []


@pytest.mark.parametrize(
    ("stage", "about", "goals"),
    [
        ("loader", CPU, [(1.0, 1)]),
        ("loader", GPU, [(1.0, 1), (50_000, 0)]),
        ("loader", GPU | {"geometry": "original"}, [(1.0, 1), (15_000, 0)]),
        ("peers", CPU, [(2.0, 6), (1.1, 2)]),
        ("model", CPU, [(1.9, 3)]),
        ("model", CPU | {"precision": "bf16"}, []),
        ("model", CPU | {"precision": "bf16", "amx": True}, [(3.3, 3)]),
        ("model", GPU, [(1.5, 3), (80_000, 0)]),
        ("start", CPU, []),
        ("start", GPU, [(25, 0)]),
    ],
)
def test_goals_depend_on_device_precision_and_images(stage, about, goals):
    figures = {"ours": [1.0]} | {name: [1.0] for gate in GATES for name in gate.others}
    assert [(j.gate.goal, len(j.over)) for j in judge(stage, figures, about)] == goals
