"""Random resized crops have torchvision's meaning and depend only on (seed, epoch, position)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import composition, plan
from pipeline.plan import RESIZE_DRAWS, Plan, draws, resize_draws
from pipeline.resized_crop import resized_crops

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's defaults


def as_in_torchvision(drawn: list[float], width: int, height: int, scale, ratio) -> tuple[int, ...]:
    """Do as RandomResizedCrop.get_params does with these draws, but never return an empty crop."""
    *tries, x, y = drawn
    for share, shape in zip(tries[:10], tries[10:], strict=True):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
        low, high = map(math.log, ratio)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = width, height
    if width / height < min(ratio):
        h = max(1, round(width / min(ratio)))
    elif width / height > max(ratio):
        w = max(1, round(height * max(ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


sides = st.integers(1, 700)
shares = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: tuple(sorted(pair)))
ratios = st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(lambda pair: tuple(sorted(pair)))


@given(st.integers(0, 2**63), sides, sides, shares, ratios)
def test_crops_are_those_of_torchvision(seed, width, height, scale, ratio):
    drawn = resize_draws(seed, 0, 0, 5)
    ours = resized_crops(drawn, np.full(5, width), np.full(5, height), scale, ratio)
    assert [tuple(box) for box in ours.tolist()] == [
        as_in_torchvision(row, width, height, scale, ratio) for row in drawn.tolist()
    ]
    left, top, w, h = ours.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (w > 0).all()
    assert (h > 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 100, (433, 0, 133, 100)),  # at most 4/3 times as wide as high
        (100, 1000, (0, 433, 100, 133)),  # at least 3/4 times as wide as high
        (100, 100, (0, 0, 100, 100)),
    ],
)
def test_the_largest_central_part_is_taken_if_no_try_fits(width, height, expected):
    drawn = np.full((1, RESIZE_DRAWS), np.nextafter(1, 0))  # the whole area, at an aspect ratio of 4/3
    drawn[0, 10:20:2] = 0.0  # or of 3/4
    [box] = resized_crops(drawn, np.array([width]), np.array([height]), (1.0, 1.0), RATIO)
    assert tuple(box) == expected


def test_areas_and_logarithms_of_ratios_are_uniform():
    """Five standard errors: a sound generator would fail with fewer than one seed in a thousand."""
    count = 20_000
    drawn = resize_draws(1, 2, 0, count)
    size = np.full(count, 4000)
    _, _, w, h = resized_crops(drawn, size, size, (0.1, 0.5), RATIO).T
    share, ratio = (w * h / 4000**2 - 0.1) / 0.4, (np.log(w / h) / math.log(4 / 3) + 1) / 2
    for values in (share, ratio):
        assert values.min() > -0.002
        assert values.max() < 1.002
        counts, _ = np.histogram(values, 20, (-0.002, 1.002))
        assert (abs(counts[1:-1] - count / 20) < 5 * math.sqrt(count / 20) + 0.004 * count / 20).all()
    assert abs(np.corrcoef(share, ratio)[0, 1]) < 5 / math.sqrt(count)


def test_the_numbers_are_independent_of_the_other_draws():
    resize, others = resize_draws(3, 1, 0, 20_000), draws(3, 1, 0, 20_000)
    assert 0 <= resize.min() < resize.max() < 1
    columns = np.column_stack((resize, others.uniform, others.mirror, others.normal))
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert abs(correlation).max() < 5 / math.sqrt(20_000)


@given(st.integers(0, 2**63), st.integers(1, 24), st.lists(st.integers(1, 12), min_size=1), st.integers(0, 9))
def test_the_numbers_of_a_step_are_those_of_its_positions_on_any_world(seed, batch, shards, step):
    plan = Plan(seed, batch, tuple(shards))
    expected = [
        resize_draws(seed, position // plan.samples, position % plan.samples, 1)
        for position in range(step * batch, (step + 2) * batch)
    ]
    np.testing.assert_array_equal(plan.step_resizes(step, steps=2), np.concatenate(expected))
    for world in (n for n in range(1, batch + 1) if batch % n == 0):
        parts = [plan.step_resizes(step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), plan.step_resizes(step))


def test_the_streams_of_random_words_differ():
    """Those of random resized crops were those that choose the images of a mixture."""
    streams = [plan._ORDER, plan._AUGMENT, plan._RESIZE, composition._STREAM]
    assert len(set(streams)) == 4
