"""The plan of a run on 512 GPUs over ImageNet's training set, which needs no GPU."""

import numpy as np
import pytest

from pipeline.composition import Composition
from pipeline.plan import Plan, epoch_order

SAMPLES, SHARDS, WORLD = 1_281_167, 1_282, 512
WHOLE, REST = divmod(SAMPLES, SHARDS)
LAYOUT = (WHOLE + 1,) * REST + (WHOLE,) * (SHARDS - REST)  # equal parts of at most 1,000 samples
SHARD_OF = np.repeat(np.arange(SHARDS), LAYOUT)
WINDOW = 16  # shards


def parts(plan: Plan, step: int, world: int) -> list[np.ndarray]:
    """Return the samples of each rank in a step."""
    return [plan.step_samples(step, rank, world) for rank in range(world)]


@pytest.mark.parametrize("window", [0, WINDOW])
def test_512_ranks_share_each_step_equally_and_take_each_sample_once_an_epoch(window):
    plan = Plan(seed=0, batch=32_768, shard_samples=LAYOUT, window=window)
    steps = [parts(plan, step, WORLD) for step in range(plan.steps(epochs=1))]
    assert {len(part) for step in steps for part in step} == {32_768 // WORLD}
    taken = np.concatenate([part for step in steps for part in step])
    assert (np.bincount(taken[:SAMPLES], minlength=SAMPLES) == 1).all()


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("batch", [1_024, 32_768])
def test_512_ranks_follow_the_order_of_1_rank_and_of_8(batch, window):
    plan = Plan(seed=0, batch=batch, shard_samples=LAYOUT, window=window)
    last = plan.steps(epochs=1) - 1  # which continues into the next epoch
    for step in (0, 1, last // 2, last):
        [alone] = parts(plan, step, 1)
        np.testing.assert_array_equal(np.concatenate(parts(plan, step, 8)), alone)
        np.testing.assert_array_equal(np.concatenate(parts(plan, step, WORLD)), alone)


def test_512_ranks_with_2_images_each_cover_the_epoch():
    plan = Plan(seed=0, batch=1_024, shard_samples=LAYOUT)
    taken = np.concatenate([plan.step_samples(step) for step in range(plan.steps(epochs=1))])
    assert (np.bincount(taken[:SAMPLES], minlength=SAMPLES) == 1).all()
    assert {len(part) for part in parts(plan, 0, WORLD)} == {2}


def test_a_window_bounds_the_shards_that_a_rank_reads_in_a_step():
    plan = Plan(seed=0, batch=32_768, shard_samples=LAYOUT, window=WINDOW)
    shards = [len(np.unique(SHARD_OF[part])) for part in parts(plan, 0, WORLD)]
    assert max(shards) <= 2 * WINDOW  # if a window ends within the rank's images
    everywhere = Plan(seed=0, batch=32_768, shard_samples=LAYOUT)
    spread = [len(np.unique(SHARD_OF[part])) for part in parts(everywhere, 0, WORLD)]
    assert min(spread) > 2 * WINDOW  # about 62 for 64 images of 1,282 shards


def test_512_ranks_share_balanced_epochs_of_a_thousand_classes():
    labels = np.sqrt(np.linspace(0, 999.99**2, SAMPLES)).astype(int)  # from 2 images to about 2,560
    composition = Composition.of([labels], [1.0], balance=1.0)
    plan = Plan(seed=0, batch=32_768, shard_samples=LAYOUT, composition=composition)
    for epoch in (0, 30):  # as after a restart
        step = plan.steps(epoch)
        [alone] = parts(plan, step, 1)
        np.testing.assert_array_equal(np.concatenate(parts(plan, step, WORLD)), alone)
        counts = np.bincount(labels[epoch_order(0, epoch, LAYOUT, composition=composition)])
        assert set(counts.tolist()) == {SAMPLES // 1_000, SAMPLES // 1_000 + 1}
