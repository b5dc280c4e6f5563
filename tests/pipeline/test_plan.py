"""Each sample comes once per epoch, or as its weight says, with any number of ranks, any window, and wherever
a run resumes.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.plan import Plan, RankBatch, draws, epoch_order, share
from tests.pipeline.weighted import weighted

seeds = st.integers(0, 2**63)
layouts = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@st.composite
def plans_as_is(draw: st.DrawFn) -> Plan:
    return Plan(
        seed=draw(seeds),
        batch=draw(st.integers(1, 40)),
        shard_samples=tuple(draw(layouts)),
        window=draw(st.integers(0, 9)),
        crop_chunk=draw(st.sampled_from([1, 1, 2, 5, 50])),
    )


@st.composite
def weighted_plans(draw: st.DrawFn) -> Plan:
    plan = draw(plans_as_is())
    return dataclasses.replace(plan, composition=draw(weighted(plan.samples)).composition())


plans = st.one_of(plans_as_is(), weighted_plans())


def forgetful(plan: Plan) -> Plan:
    """Return the same plan without the state of earlier epochs, as after a restart."""
    ours = plan.composition
    return (
        plan if ours is None else dataclasses.replace(plan, composition=dataclasses.replace(ours, _states=[]))
    )


def joined(batches: list[RankBatch]) -> dict[str, np.ndarray]:
    """Return the fields of consecutive batches, concatenated."""
    fields = {"samples": [b.samples for b in batches], "epoch": [b.epoch for b in batches]}
    for name in ("uniform", "mirror", "normal"):
        fields[name] = [getattr(b.draws, name) for b in batches]
    return {name: np.concatenate(parts) for name, parts in fields.items()}


def assert_equal(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@given(plans_as_is(), st.integers(1, 3))
def test_each_sample_comes_once_an_epoch_with_the_order_and_draws_of_that_epoch(plan, epochs):
    run = joined([plan.step_batch(step) for step in range(plan.steps(epochs))])
    for epoch in range(epochs):
        part = slice(epoch * plan.samples, (epoch + 1) * plan.samples)
        assert (run["epoch"][part] == epoch).all()
        assert sorted(run["samples"][part]) == list(range(plan.samples))
        order = epoch_order(plan.seed, epoch, plan.shard_samples, plan.window)
        expected = {"samples": order, **vars(draws(plan.seed, epoch, 0, plan.samples))}
        if plan.crop_chunk > 1:
            del expected["uniform"], expected["mirror"]
        assert_equal({name: run[name][part] for name in expected}, expected)
    assert (run["epoch"][epochs * plan.samples :] >= epochs).all()


@given(plans, st.integers(0, 5))
def test_a_plan_has_the_fewest_steps_that_cover_its_epochs(plan, epochs):
    steps, images = plan.steps(epochs), epochs * plan.samples
    assert steps * plan.batch >= images
    assert (steps - 1) * plan.batch < images


@given(st.data(), plans, st.integers(0, 20))
def test_ranks_divide_the_batch_of_a_single_process(data, plan, step):
    world = data.draw(st.sampled_from([n for n in range(1, plan.batch + 1) if plan.batch % n == 0]))
    parts = [plan.step_batch(step, rank, world) for rank in range(world)]
    assert {len(part.samples) for part in parts} == {plan.batch // world}
    assert_equal(joined(parts), joined([plan.step_batch(step)]))


@given(st.data(), plans, st.integers(0, 20), st.integers(1, 5))
def test_several_steps_at_once_equal_the_single_steps(data, plan, step, steps):
    world = data.draw(st.sampled_from([n for n in range(1, plan.batch + 1) if plan.batch % n == 0]))
    for rank in range(world):
        singles = [plan.step_batch(single, rank, world) for single in range(step, step + steps)]
        assert_equal(joined([plan.step_batch(step, rank, world, steps)]), joined(singles))


@given(plans, st.integers(2, 41))
def test_a_world_that_does_not_divide_the_batch_is_refused(plan, world):
    assume(plan.batch % world)
    with pytest.raises(ValueError, match=f"batch of {plan.batch} images .* {world} processes"):
        plan.step_batch(0, 0, world)


@pytest.mark.parametrize("batch", [0, -8])
def test_a_batch_without_images_is_refused(batch):
    with pytest.raises(ValueError, match=f"the batch must have 1 image or more, not {batch}$"):
        Plan(seed=0, batch=batch, shard_samples=(3,))


@given(plans, st.lists(st.integers(0, 5), min_size=8, max_size=12))
def test_a_step_does_not_depend_on_earlier_steps(plan, steps):
    forwards, restarted = {step: joined([plan.step_batch(step)]) for step in range(6)}, forgetful(plan)
    for step in steps:
        batch = restarted.step_batch(step)
        assert_equal(joined([batch]), forwards[step])
        batch.samples[:] = -1  # which must not change the plan


@given(plans, st.integers(0, 30))
def test_a_position_has_the_same_image_and_the_draws_of_its_chunk_in_batches_of_any_size(plan, step):
    one_by_one = dataclasses.replace(plan, batch=1, crop_chunk=1)
    positions = range(step * plan.batch, (step + 1) * plan.batch)
    singles = joined([one_by_one.step_batch(position) for position in positions])
    firsts = [index // plan.crop_chunk * plan.crop_chunk for index in range(plan.batch)]
    expected = singles | {name: singles[name][firsts] for name in ("uniform", "mirror")}
    assert_equal(expected, joined([plan.step_batch(step)]))


@pytest.mark.parametrize(
    ("batch", "chunks"),
    [
        (128, [32, 32, 32, 32]),  # of the release, whose data batches begin a new chunk
        (80, [32, 32, 16]),
        (15, [15]),
    ],
)
def test_consecutive_images_of_a_step_share_a_crop_and_a_mirror_but_no_colour(batch, chunks):
    """convdata_jpeg.py:238-246: one offset and flip for images c to min(c + 32, number of images)."""
    plan = Plan(seed=0, batch=batch, shard_samples=(200,), crop_chunk=32)
    for step in range(3):
        drawn = plan.step_batch(step).draws
        _, first, sizes = np.unique(drawn.uniform, axis=0, return_index=True, return_counts=True)
        assert sizes[np.argsort(first)].tolist() == chunks
        changes = set((np.flatnonzero(np.diff(drawn.mirror)) + 1).tolist())
        assert changes <= set(np.cumsum(chunks).tolist())
        assert len(np.unique(drawn.normal, axis=0)) == batch


@given(seeds, st.integers(0, 9), st.integers(0, 99), st.integers(1, 20))
def test_draws_of_a_part_equal_those_of_the_whole_epoch(seed, epoch, start, count):
    part, whole = draws(seed, epoch, start, count), draws(seed, epoch, 0, 120)
    for name in ("uniform", "mirror", "normal"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start : start + count])


@given(seeds, st.integers(0, 99), st.integers(0, 9))
def test_seeds_and_epochs_differ(seed, epoch, window):
    other = {"another seed": (seed + 1, epoch), "another epoch": (seed, epoch + 1)}
    layout = [9] * 10
    for numbers in other.values():
        ours, theirs = epoch_order(seed, epoch, layout, window), epoch_order(*numbers, layout, window)
        assert (ours == theirs).mean() < 0.5
        assert (draws(seed, epoch, 0, 5).uniform != draws(*numbers, 0, 5).uniform).all()
        assert (draws(seed, epoch, 0, 5).normal != draws(*numbers, 0, 5).normal).all()


def test_both_shards_and_samples_are_shuffled_in_windows():
    layout, window, samples = [50] * 8, 2, 100
    orders = np.array([epoch_order(0, epoch, layout, window) for epoch in range(40)])
    first = orders[:, :samples] // 50
    # Two of eight shards begin an epoch; the chance that any never does so in 40 is below 8 · .75^40 < 1e-4.
    assert set(first.ravel()) == set(range(8))
    # In a window, 50 of 99 neighbours come from different shards, within five standard errors.
    changes = (first[:, 1:] != first[:, :-1]).mean()
    assert abs(changes - 50 / 99) < 5 * 0.5 / np.sqrt(99 * 40)


@given(plans, st.integers(0, 9))
def test_samples_are_sorted_by_random_words_within_windows_of_shards(plan, epoch):
    """The first words are those of the shards, which form the windows; those of the samples follow."""
    layout, samples = plan.shard_samples, plan.samples
    key = np.random.SeedSequence((plan.seed, epoch, 0)).generate_state(2, np.uint64)
    words = np.random.Philox(key=key).random_raw(len(layout) + samples).tolist()
    by_word = sorted(range(len(layout)), key=lambda shard: words[shard])
    window_of = {shard: index // (plan.window or len(layout)) for index, shard in enumerate(by_word)}
    shard_of = [shard for shard, samples in enumerate(layout) for _ in range(samples)]
    chosen = plan.composition.samples(plan.seed, epoch).tolist() if plan.composition else range(samples)
    places = sorted(
        range(samples), key=lambda place: (window_of[shard_of[chosen[place]]], words[len(layout) + place])
    )
    expected = [chosen[place] for place in places]
    assert epoch_order(plan.seed, epoch, layout, plan.window, plan.composition).tolist() == expected


def test_a_global_shuffle_is_uniform():
    samples, epochs = 20, 4000
    places = np.argsort([epoch_order(1, epoch, [5, 1, 14]) for epoch in range(epochs)], axis=1)
    counts = np.array([np.bincount(places[:, sample], minlength=samples) for sample in range(samples)])
    expected = epochs / samples
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (samples - 1) ** 2  # of a table whose rows and columns all have the same sum
    chi_square = statistic * (samples - 1) / samples  # one permutation's places are not independent
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)  # five standard deviations


@given(st.integers(0, 500), st.integers(1, 40))
def test_share_puts_each_sample_on_one_rank(samples, world):
    shares = [share(samples, rank, world) for rank in range(world)]
    assert [number for part in shares for number in part] == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
