"""Each epoch has the quota of each dataset and class, to one image, and uses the images of a class alike."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import composition
from pipeline.composition import Composition, apportion
from tests.pipeline.weighted import Weighted, weighted

cases = st.integers(1, 60).flatmap(weighted)
seeds = st.integers(0, 2**63)
ROUNDING = 1e-6  # of an image: shares are rounded to integers


@given(cases, seeds, st.integers(1, 6))
def test_each_epoch_has_the_quotas_of_datasets_and_classes_to_one_image(case: Weighted, seed, epochs):
    composition, images = case.composition(), sum(map(len, case.labels))
    ends = np.cumsum([len(own) for own in case.labels])
    for epoch in range(epochs):
        taken = composition.samples(seed, epoch)
        assert len(taken) == images
        parts = np.split(taken, np.searchsorted(taken, ends[:-1]))
        for part, end, own, weight in zip(parts, ends, case.labels, case.weights, strict=True):
            assert abs(len(part) - images * weight / sum(case.weights)) < 1 + ROUNDING
            if not case.balance:
                continue
            found = np.bincount(own[part - (end - len(own))], minlength=5)
            sizes = np.bincount(own, minlength=5)
            shares = np.where(sizes, np.maximum(sizes, 1) ** (1 - case.balance), 0)
            assert (abs(found - len(part) * shares / shares.sum()) < 1 + ROUNDING).all()
            assert not found[sizes == 0].any()


@given(cases, seeds, st.integers(1, 12))
def test_the_images_of_a_class_are_used_equally_often_over_epochs(case: Weighted, seed, epochs):
    composition, images = case.composition(), sum(map(len, case.labels))
    used = np.zeros(images, int)
    for epoch in range(epochs):
        used += np.bincount(composition.samples(seed, epoch), minlength=images)
        start = 0
        for own in case.labels:
            ours = used[start : start + len(own)]
            for group in [ours[own == label] for label in set(own)] if case.balance else [ours]:
                assert group.max() - group.min() <= 1
            start += len(own)


@given(cases, seeds, st.permutations(range(6)))
def test_an_epoch_does_not_depend_on_which_epochs_were_asked_for_before(case: Weighted, seed, order):
    asked = case.composition()
    for epoch in order:
        np.testing.assert_array_equal(asked.samples(seed, epoch), case.composition().samples(seed, epoch))


@given(st.lists(st.integers(1, 2**30), min_size=1, max_size=40), st.lists(st.integers(0, 500), max_size=30))
@example([2, 1, 1], [3, 2])  # the first is owed most, but its share of two images is exactly one
def test_quotas_are_exact_in_each_round_and_nearly_so_over_all(weights, rounds):
    """In integers: an image is sum(weights)."""
    owed, weighed, total = np.zeros(len(weights), np.int64), np.array(weights), sum(weights)
    so_far = np.zeros_like(weighed)
    for number, images in enumerate(rounds, 1):
        counts, owed = apportion(images, weighed, owed)
        so_far += counts
        assert counts.sum() == images
        assert (abs(counts * total - images * weighed) < total).all()
        assert (abs(so_far * total - sum(rounds[:number]) * weighed) < 2 * total).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1], [[4, 3, 3], [3, 4, 3], [3, 3, 4]]),  # the tenth image goes around
        ([2, 2, 1], [[4, 4, 2]] * 3),
        ([16, 3, 1], [[8, 2, 0], [8, 1, 1], [8, 2, 0]]),  # 8, 1.5 and .5 images
    ],
)
def test_fractions_of_an_image_are_owed_to_later_rounds(weights, expected):
    owed, found = np.zeros(3, np.int64), []
    for _ in expected:
        counts, owed = apportion(10, np.array(weights), owed)
        found.append(counts.tolist())
    assert found == expected


def test_balance_leads_from_the_classes_as_they_are_to_equal_ones():
    labels = np.repeat([0, 1, 2], [1, 16, 81])
    by_balance = {
        0.5: [7, 28, 63],  # 98 images in proportion to 1, 4 and 9
        1.0: [33, 33, 32],
    }
    for balance, expected in by_balance.items():
        assert Composition.of([labels], [1.0], balance).counts(0).tolist() == expected


def test_which_images_of_a_class_come_first_is_uniform():
    labels, epochs = np.repeat([0, 1], [12, 4]), 1000
    first = [Composition.of([labels], [1.0], 1.0).samples(seed, 0) for seed in range(epochs)]
    counts = np.bincount(np.concatenate(first), minlength=16)
    assert (counts[12:] == 2 * epochs).all()
    expected = epochs * 8 / 12
    # Each image of the large class is among the eight with a chance of 2/3; five standard deviations.
    assert abs(counts[:12] - expected).max() < 5 * np.sqrt(epochs * 2 / 3 / 3)


@given(seeds)
def test_seeds_and_epochs_choose_different_images(seed):
    composition = Composition.of([np.repeat([0, 1], [90, 10])], [1.0], 1.0)
    ours = composition.samples(seed, 0)
    assert (ours != composition.samples(seed, 1)).any()
    assert (ours != composition.samples(seed + 1, 0)).any()


def test_threads_that_ask_at_the_same_time_get_the_same_epochs(monkeypatch):
    """The quotas of each epoch follow from those of the last, so a thread must not see half of an update."""
    real = composition.apportion

    def slow(*given):
        time.sleep(0.001)
        return real(*given)

    case = Weighted([np.arange(7) % 3, np.arange(5) % 2], [1.0, 0.3], 0.5)
    expected = [case.composition().counts(epoch).tolist() for epoch in range(9)]
    monkeypatch.setattr(composition, "apportion", slow)
    shared = case.composition()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(shared.counts, [8] * 4))
    assert [shared.counts(epoch).tolist() for epoch in range(9)] == expected
