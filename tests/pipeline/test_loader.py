"""Loaders give the batches of the plan as tensors, for any number of ranks, threads and prefetched ones."""

import dataclasses
import json
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.loader
from pipeline.checked import Damage
from pipeline.colour import colour_offsets
from pipeline.graph import GraphOptions, train_pipeline
from pipeline.loader import Batch, Dataset, Decoding, evaluation_loader, synthetic_loader, train_loader
from pipeline.manifest import HEAD_BYTES, DatasetError
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from pipeline.stream import Stream
from tests.helpers import assert_same_batches, copies, wait_until
from tests.trees import pack_here

CROP = 64
DECODING = Decoding(crop=CROP)
Outputs = tuple[Any, Any]  # of one run of a DALI pipeline


@pytest.fixture(scope="module")
def dataset(packed: Path) -> Dataset:
    return Dataset(packed)


def plan_of(dataset: Dataset, batch: int = 12) -> Plan:
    return Plan(
        seed=7, batch=batch, shard_samples=tuple(s.samples for s in dataset.manifest.split("train").shards)
    )


def train(dataset: Dataset, steps: range, decoding: Decoding = DECODING, **options) -> list[Batch]:
    """Return copies of batches with the colours of code2012."""
    return copies(train_loader(dataset, plan_of(dataset), steps, decoding, colour="code2012", **options))


@pytest.fixture(scope="module")
def reference(dataset: Dataset) -> list[Batch]:
    """Eight steps, in which one epoch of 60 samples ends."""
    return train(dataset, range(8))


@pytest.fixture(scope="module", params=["256", "short256", "original"])
def any_geometry(
    request: pytest.FixtureRequest, oblong: Path, tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    """Ten training images; portrait and landscape, except for `256`."""
    output = tmp_path_factory.mktemp("shards")
    pack_here("--input", oblong, "--out", output, "--geometry", request.param, "--size", "100")
    return Dataset(output)


def shown(jpeg: np.ndarray, shorter: int) -> np.ndarray:
    """Return the picture, [h,w,3], that is cropped."""
    image = Image.open(BytesIO(jpeg.tobytes()))
    size = [round(side * shorter / min(image.size)) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def test_training_batches_are_what_the_plan_says(any_geometry):
    reader, statistics = any_geometry.reader("train"), any_geometry.manifest.pixels
    plan = plan_of(any_geometry)
    loader = train_loader(any_geometry, plan, range(4), DECODING, colour="code2012")
    for step, (pixels, labels) in enumerate(loader):
        samples, draws = plan.step_batch(step).samples, plan.step_batch(step).draws
        np.testing.assert_array_equal(labels, reader.rows["label"][samples])
        offsets = colour_offsets("code2012", statistics, draws.normal)
        for n, sample in enumerate(samples):
            image = shown(reader.jpeg(sample), shorter=100)
            room = np.array([image.shape[1], image.shape[0]]) - CROP
            left, top = np.floor(draws.uniform[n] * (room + 1)).astype(int)
            expected = image[top : top + CROP, left : left + CROP][:, :: -1 if draws.mirror[n] else 1]
            expected = (expected - statistics.mean + offsets[n]) / 1.1
            # Decoding may round one level apart, and resizing in DALI and in Pillow another.
            difference = abs(pixels[n].permute(1, 2, 0).numpy() - expected)
            assert difference.max() < 2.001
            assert difference.mean() < 0.5


def test_batches_do_not_depend_on_where_a_block_of_draws_begins(any_geometry, monkeypatch):
    plan = plan_of(any_geometry)
    monkeypatch.setattr("pipeline.loader.BLOCK_IMAGES", 3 * plan.batch)
    batches = copies(train_loader(any_geometry, plan, range(8), DECODING, colour="paper"))
    for first, end in ((1, 8), (4, 7), (6, 8)):
        later = copies(train_loader(any_geometry, plan, range(first, end), DECODING, colour="paper"))
        assert_same_batches(later, batches[first:end])


def test_training_without_crops_and_flips_uses_the_evaluation_crop(any_geometry):
    centres = torch.cat([pixels for pixels, _ in evaluation_loader(any_geometry, "train", 4, DECODING)])
    plan = plan_of(any_geometry)
    loader = train_loader(any_geometry, plan, range(4), DECODING, crops_and_flips=False)
    for step, (pixels, _) in enumerate(loader):
        assert torch.equal(pixels, centres[plan.step_samples(step)])


def test_batches_have_the_documented_shapes_and_types(reference):
    for pixels, labels in reference:
        assert (pixels.shape, pixels.dtype) == ((12, 3, CROP, CROP), torch.float32)
        assert (labels.shape, labels.dtype) == ((12,), torch.int64)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Outputs]:
    """The outputs of DALI, which reads its inputs in place, so they must live until their batch is out."""
    inputs, outputs = [], []

    def watched_pipeline(source: Callable, options: GraphOptions, **rest) -> object:
        def watched_source() -> tuple:
            arrays = source()
            inputs.append([weakref.ref(array) for array in arrays])
            return arrays

        def watched_run(*stream) -> Outputs:
            outputs.append(run(*stream))
            assert all(array() is not None for array in inputs[len(outputs) - 1])
            return outputs[-1]

        dali = train_pipeline(watched_source, options, **rest)
        run, dali.run = dali.run, watched_run
        return dali

    monkeypatch.setattr(pipeline.loader, "train_pipeline", watched_pipeline)
    return outputs


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_tensors_share_dalis_memory_in_channels_last_format(dataset, watched, prefetch):
    decoding = Decoding(crop=CROP, prefetch=prefetch, dtype=torch.float16)
    batches = list(train_loader(dataset, plan_of(dataset), range(8), decoding))
    assert len(watched) == 8
    for batch, outputs in zip(batches, watched, strict=True):
        assert batch[0].data_ptr() == outputs[0].as_tensor().data_ptr()
        assert batch[0].is_contiguous(memory_format=torch.channels_last)


def test_batches_that_are_kept_do_not_change(dataset, reference):
    held = list(train_loader(dataset, plan_of(dataset), range(8), DECODING, colour="code2012"))
    assert_same_batches(held, reference)


@pytest.mark.parametrize("world", [2, 3, 12])
def test_all_ranks_together_get_the_batches_of_one_process(dataset, reference, world):
    ranks = [train(dataset, range(8), rank=rank, world=world) for rank in range(world)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same_batches(together, reference)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_run_may_begin_at_any_step(dataset, reference, start):
    assert_same_batches(train(dataset, range(start, 8)), reference[start:])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("pipelines", [1, 2, 3, 9])
def test_nothing_that_decoding_has_several_of_changes_anything(
    dataset, reference, threads, prefetch, pipelines
):
    decoding = Decoding(crop=CROP, threads=threads, prefetch=prefetch, pipelines=pipelines)
    assert_same_batches(train(dataset, range(8), decoding), reference)


def test_colour_ends_with_the_epoch_within_a_batch(dataset):
    plan = plan_of(dataset, batch=16)  # step 3 has 12 images of the first epoch and 4 of the second
    runs = {}
    for colour, epochs in (("code2012", 1), ("code2012", None), ("off", None)):
        loader = train_loader(dataset, plan, range(5), DECODING, colour=colour, colour_epochs=epochs)
        runs[colour, epochs] = torch.cat([pixels for pixels, _ in loader])
    ends, on, off = runs.values()
    assert torch.equal(ends[:60], on[:60])
    assert torch.equal(ends[60:], off[60:])
    assert (on != off).flatten(1).any(1).all()


def test_a_world_that_does_not_divide_the_batch_is_refused_at_once(dataset):
    with pytest.raises(ValueError, match="batch of 12 images cannot be divided among 5"):
        train_loader(dataset, plan_of(dataset), range(1), DECODING, world=5)


@pytest.fixture(params=["its beginning", "its second half"])
def damaged(packed_copy: Path, request) -> tuple[Dataset, int, str]:
    """A dataset with a partly overwritten sample, which opening does not read; its number and location."""
    path, rows = packed_copy / "train-000000.tar", Dataset(packed_copy).reader("train").rows
    number = int(np.flatnonzero(rows["offset"] > 65536)[0])  # in the first shard; at least 40 samples follow
    offset, size = int(rows["offset"][number]), int(rows["size"][number])
    content = bytearray(path.read_bytes())
    if request.param == "its beginning":
        content[offset : offset + 200] = bytes(200)
    else:
        content[offset + size // 2 : offset + size] = b"\xff" * (size - size // 2)
    path.write_bytes(content)
    return Dataset(packed_copy), number, f"{path} at byte {offset}"


@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("batch", [1, 5, 60])
def test_a_damaged_sample_is_named_after_the_preceding_batches(damaged, batch, prefetch):
    dataset, number, location = damaged
    loader = iter(evaluation_loader(dataset, "train", batch, Decoding(crop=CROP, prefetch=prefetch)))
    assert sum(len(labels) for _, labels in islice(loader, number // batch)) == number // batch * batch
    with pytest.raises(DatasetError, match=f"the sample in {location} .*: copy the shard again"):
        next(loader)


def test_a_damaged_sample_ends_training(damaged):
    dataset, _, location = damaged
    with pytest.raises(DatasetError, match=location):
        train(dataset, range(8))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("pipelines", [1, 2])
def test_a_sample_that_is_left_out_is_replaced_by_the_next_one(
    dataset, damaged, world, prefetch, pipelines, monkeypatch
):
    broken, number, location = damaged
    decoding = Decoding(crop=CROP, prefetch=prefetch, pipelines=pipelines)
    left_out: list[list[Damage]] = [[] for _ in range(world)]
    ours = [
        train(broken, range(8), decoding, rank=rank, world=world, on_damage=left_out[rank].append)
        for rank in range(world)
    ]
    step_batch = Plan.step_batch

    def of_the_next(plan: Plan, *where: int):
        batch = step_batch(plan, *where)
        samples = np.where(batch.samples == number, number + 1, batch.samples)
        return dataclasses.replace(batch, samples=samples)

    monkeypatch.setattr(Plan, "step_batch", of_the_next)
    for rank in range(world):
        assert_same_batches(ours[rank], train(dataset, range(8), rank=rank, world=world))
    places = [[damage.location for damage in damages] for damages in left_out]
    assert [location] in places  # once, although both epochs have it
    assert all(found in ([], [location]) for found in places)


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_a_sample_that_is_left_out_is_missing_from_an_evaluation(dataset, damaged, batch):
    broken, number, location = damaged
    left_out: list[Damage] = []
    ours = copies(evaluation_loader(broken, "train", batch, DECODING, on_damage=left_out.append))
    whole = copies(evaluation_loader(dataset, "train", batch, DECODING))
    others = [n for n in range(60) if n != number]
    for part, expected in zip(zip(*ours, strict=True), zip(*whole, strict=True), strict=True):
        assert torch.equal(torch.cat(part), torch.cat(expected)[others])
    assert [damage.location for damage in left_out] == [location]


def test_a_dataset_without_a_sound_sample_is_an_error(packed_copy):
    root, reader = packed_copy, Dataset(packed_copy).reader("val")
    (shard,) = reader.split.shards
    with open(root / shard.file, "r+b") as file:
        for offset in reader.rows["offset"].tolist():
            file.seek(offset)
            file.write(bytes(2))
    manifest = json.loads((root / "dataset.json").read_text())
    head = (root / shard.file).read_bytes()[:HEAD_BYTES]
    manifest["splits"]["val"]["shards"][0]["head_sha256"] = sha256(head).hexdigest()
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="does not begin like a JPEG"):
        list(evaluation_loader(Dataset(root), "val", 4, DECODING, on_damage=lambda damage: None))


def test_too_large_a_crop_is_refused_at_once(dataset):
    loaders = {
        "train": lambda decoding: train_loader(dataset, plan_of(dataset), range(1), decoding),
        "val": lambda decoding: evaluation_loader(dataset, "val", 4, decoding),
    }
    for load in loaders.values():
        assert next(iter(load(Decoding(crop=80))))[0].shape[2:] == (80, 80)
        with pytest.raises(
            DatasetError,
            match="crop of 81 px does not fit into images of 80 px: set the crop to 80 px or less",
        ):
            load(Decoding(crop=81))


def test_a_synthetic_batch_has_the_form_of_a_real_one(reference):
    first, second = islice(synthetic_loader(12, 10, DECODING), 2)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    for ours, real in zip(first, reference[0], strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride())
    assert set(first[1].tolist()) <= set(range(10))
    assert -128 <= first[0].min() < -100
    assert 100 < first[0].max() <= 127


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("batch", [12, 24, 60])
def test_samples_are_fetched_ahead_of_their_use(dataset, stays, batch, monkeypatch):
    """Each is fetched before its first use, or before each use if the dataset does not stay in memory."""
    fetched: list[int] = []
    monkeypatch.setattr(Stream, "look_ahead", 20)
    monkeypatch.setattr(ShardReader, "fits_in_page_cache", stays)
    monkeypatch.setattr(ShardReader, "prefetch", lambda self, numbers: fetched.extend(numbers.tolist()))
    plan = plan_of(dataset, batch)
    used = 0
    for _, labels in train_loader(dataset, plan, range(120 // batch), DECODING):
        used += len(labels)
        assert len(fetched) >= min(used + 20, 60)
    order = np.concatenate([plan.step_batch(step).samples for step in range(120 // batch)]).tolist()
    assert set(fetched) == set(order)
    if not stays:
        assert fetched == order


def threads_of_dali() -> dict[str, set[int]]:
    """Return the cores on which each decoding thread may run, by the ID of the thread."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            if (task / "comm").read_text().startswith("[DALI][TP"):
                found[task.name] = os.sched_getaffinity(int(task.name))
    return found


@pytest.mark.parametrize("is_bound", [True, False])
def test_each_decoding_thread_stays_on_its_core(packed, is_bound):
    before, dataset = threads_of_dali(), Dataset(packed)
    allowed = os.sched_getaffinity(0)
    cores = tuple(sorted(allowed)[:2])
    decoding = Decoding(crop=64, threads=len(cores), cores=cores if is_bound else ())
    loader = train_loader(dataset, plan_of(dataset), range(2), decoding)
    next(loader)
    expected = [{core} for core in cores] if is_bound else [allowed] * len(cores)

    def found() -> list[set[int]]:
        new = [where for thread, where in threads_of_dali().items() if thread not in before]
        return sorted(new, key=sorted)

    wait_until(lambda: found() == expected)  # a thread binds itself when it first runs
