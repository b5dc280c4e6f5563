"""How soon a run learned, from its evaluations."""

import math

import pytest

from tools.experiments.ablations import ablations, slow
from tools.experiments.measuring import epochs_measure, epochs_to
from tools.experiments.record import Row


@pytest.mark.parametrize(
    ("errors", "target", "expected"),
    [
        ([0.9, 0.7, 0.5], 0.6, 2.5),  # halfway between the second and the third
        ([0.9, 0.7, 0.5], 0.7, 2),
        ([0.4, 0.3], 0.5, 1),  # already after the first
        ([0.9, 0.4, 0.8, 0.3], 0.5, 1.8),  # the first time counts
        ([0.9, 0.7], 0.6, math.inf),
        ([], 0.6, math.inf),
    ],
)
def test_epochs_to_an_error_are_interpolated(errors, target, expected):
    rows = [{"epoch": number, "top1_error": error} for number, error in enumerate(errors, 1)]
    assert epochs_to(rows, target) == pytest.approx(expected)


def test_nets_that_missed_the_target_are_named():
    rows = [
        Row(system="AlexNet", measured={epochs_measure(40): [3.0, 4.0]}),
        Row(system="tanh", measured={}),
    ]
    assert slow(rows, 40) == ["At least one seed did not reach a validation error of 40 % in: tanh."]
    assert slow(rows[:1], 40) == []


def test_each_ablation_has_a_claim_with_a_published_value_or_sign():
    for _, row in ablations(50):
        assert row.claims
        assert set(row.claims) <= {*row.published, *row.signs}
