"""The loaders for any training loop: epochs, states, processes, normalisation, and bad input."""

import gc
import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from pipeline import Batch, Damage, Dataset, EvaluationLoader, Loader, LoaderError, open_dataset
from pipeline.resized_crop import resized_crops
from tests.helpers import assert_same_batches, copies, wait_until
from tests.trees import pack_here

CROP, BATCH = 64, 16  # of 60 images, so that epochs end within batches
CPU = {"crop": CROP, "device": "cpu", "seed": 3}


@pytest.fixture(scope="module")
def dataset(packed: Path) -> Dataset:
    return open_dataset(packed)


@pytest.fixture
def loader(dataset: Dataset) -> Iterator[Loader]:
    with Loader(dataset, BATCH, **CPU) as loader:
        yield loader


@pytest.fixture(scope="module")
def reference(dataset: Dataset) -> list[list[Batch]]:
    """The batches of four epochs, which together are 15 steps."""
    loader = Loader(dataset, BATCH, **CPU)
    return [copies(loader.epoch(number)) for number in range(4)]


def flat(epochs: list[list[Batch]]) -> list[Batch]:
    return [batch for epoch in epochs for batch in epoch]


def test_epochs_follow_each_other_and_have_each_image_once(dataset, loader, reference):
    assert [len(epoch) for epoch in reference] == [4, 4, 4, 3]
    assert [len(loader.epoch(number)) for number in range(4)] == [4, 4, 4, 3]
    assert (len(loader), loader.steps(4)) == (4, 15)
    labels = torch.cat([labels for _, labels in flat(reference)]).reshape(4, 60)
    counts = np.bincount(dataset.reader("train").rows["label"])
    assert all(torch.bincount(epoch).tolist() == counts.tolist() for epoch in labels)
    assert len({tuple(epoch.tolist()) for epoch in labels}) == 4
    samples = np.concatenate([loader.plan.step_samples(step) for step in range(15)]).reshape(4, 60)
    assert [sorted(epoch) for epoch in samples.tolist()] == [list(range(60))] * 4


def test_an_epoch_can_be_stopped_repeated_and_left_out(loader, reference):
    assert_same_batches(copies(islice(loader.epoch(0), 2)), reference[0][:2])
    assert_same_batches(copies(loader.epoch(0)), reference[0])
    assert_same_batches(copies(loader.epoch(3)), reference[3])


def test_two_iterations_over_one_loader_and_two_loaders_do_not_disturb_each_other(dataset, loader, reference):
    with Loader(dataset, BATCH, **CPU) as other:
        found = [copies(both) for both in zip(loader.epoch(0), other.epoch(1), strict=True)]
    for both, expected in zip(found, zip(reference[0], reference[1], strict=True), strict=True):
        assert_same_batches(both, list(expected))
    twice = [copies(both) for both in zip(loader.epoch(0), loader.epoch(2), strict=True)]
    for both, expected in zip(twice, zip(reference[0], reference[2], strict=True), strict=True):
        assert_same_batches(both, list(expected))


@pytest.mark.parametrize("steps", [0, 3, 4, 9, 11])
@pytest.mark.parametrize("world", [1, 4])
def test_a_state_continues_with_the_next_batch_on_any_number_of_processes(dataset, reference, steps, world):
    first = Loader(dataset, BATCH, **CPU)
    for epoch in range(4):
        for _ in first.epoch(epoch):
            if first.step == steps:
                break
        if first.step >= steps:
            break
    if not steps:
        first = Loader(dataset, BATCH, **CPU)
    state = json.loads(json.dumps(first.state_dict()))
    parts = []
    for rank in range(world):
        with Loader(dataset, BATCH, rank=rank, world=world, **CPU) as loader:
            loader.load_state_dict(state)
            assert loader.step == steps
            assert [len(loader.epoch(number)) for number in range(loader.current_epoch)] == [0] * (
                loader.current_epoch
            )
            parts.append(flat([copies(loader.epoch(number)) for number in range(4)]))
    together = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]
    assert_same_batches(together, flat(reference)[steps:])


def test_the_current_epoch_is_that_of_the_next_batch(loader):
    seen = []
    for number in range(4):
        for _ in loader.epoch(number):
            seen.append(loader.current_epoch)
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "the state belongs to a loader with seed=3, but this one has seed=4"),
        ({"batch": 8}, "the state belongs to a loader with batch=16, but this one has batch=8"),
        ({"shuffle_window": 1}, "with window=0, but this one has window=1"),
        ({"split": "val"}, "with split='train', but this one has split='val'"),
    ],
)
def test_the_state_of_another_loader_is_refused(dataset, loader, change, message):
    with (
        Loader(dataset, **{"batch": BATCH, **CPU} | change) as other,
        pytest.raises(LoaderError, match=message),
    ):
        other.load_state_dict(loader.state_dict())


def test_the_state_of_another_dataset_is_refused(pictures, dataset, loader, tmp_path):
    pack_here("--input", pictures, "--out", tmp_path, "--size", "90")
    with Loader(open_dataset(tmp_path), BATCH, **CPU) as other:
        with pytest.raises(
            LoaderError, match=f"another dataset .* than {tmp_path} .*: open the dataset"
        ) as error:
            other.load_state_dict(loader.state_dict())
        assert "\n" not in str(error.value)
        assert other.step == 0


@pytest.mark.parametrize("state", [{}, {"step": 1, "dataset": "a", "plan": 3}, None, [1]])
def test_what_is_not_a_state_is_refused(loader, state):
    with pytest.raises(LoaderError, match="not the state of a loader"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("step", [-1, "1", None, 1.5])
def test_a_step_that_cannot_be_is_refused(loader, step):
    with pytest.raises(LoaderError, match="should be a whole number from 0"):
        loader.load_state_dict(loader.state_dict() | {"step": step})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "the batch must have 1 image or more, not 0"),
        ({"rank": 0, "world": 5}, "a batch of 16 images cannot be divided among 5 processes"),
        ({"rank": 2, "world": 2}, "rank 2 is not one of the 2 processes, which are counted from 0"),
        ({"rank": 1}, "rank and world must be given together"),
        ({"seed": -1}, "the seed must be a whole number from 0, not -1"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"std": (1.0, float("nan"), 1.0)}, "std must be three numbers"),
        ({"std": (0.229, 0.224, 0.225)}, "multiply mean and std by 255"),
        ({"scale": (0.0, 1.0)}, r"scale must be two shares of the area, such as \(0.08, 1\), not"),
        ({"scale": (0.5, 0.1)}, "scale must be two shares of the area"),
        ({"scale": (0.1, 1), "ratio": (2, 1)}, "ratio must be two bounds of width / height"),
        ({"scale": (0.1, 1), "crop_chunk": 2}, "omit crop_chunk or scale"),
        ({"colour": "red"}, "colour must be paper, code2012 or off, not red"),
        (
            {"dtype": torch.int8},
            "dtype must be torch.float32 or torch.float16 or torch.uint8, not torch.int8",
        ),
        ({"dtype": torch.uint8, "mean": (1, 2, 3)}, "torch.uint8 are not normalised"),
        ({"crop": 0}, "crop must be 1 or more, not 0"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
        ({"prefetch": -1}, "prefetch must be 1 or more, not -1"),
        ({"crop_chunk": 0}, "crop_chunk must be 1 or more, not 0"),
        ({"shuffle_window": -1}, "shards to shuffle together must be 0 or more, not -1"),
        ({"hw_decoder_load": 3.0}, "hw_decoder_load must be from 0 to 1, not 3.0"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, not gpu"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, not meta"),
        ({"device": "cuda:99"}, r"device cuda:99: torch finds \d+ GPUs here"),
        ({"split": "test"}, "the dataset has no split 'test'; it has: train, val"),
        ({"crop": 81}, "a crop of 81 px does not fit into images of 80 px"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(dataset, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Loader(dataset, **{"batch": BATCH, **CPU} | arguments)
    assert "\n" not in str(error.value)


def test_there_is_no_epoch_before_the_first_one(loader):
    with pytest.raises(LoaderError, match="there is no epoch -1"):
        loader.epoch(-1)


@pytest.mark.parametrize("count", [1, None])
@pytest.mark.parametrize(("kind", "options"), [(Loader, {"pipelines": 2}), (EvaluationLoader, {})])
def test_a_closed_loader_has_no_threads_and_cannot_be_used(dataset, kind, options, count):
    """After one batch, which the second pipeline has not begun, or a pass, and without garbage collection."""

    def threads() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    def batches(loader: Loader | EvaluationLoader) -> Iterator[Batch]:
        return iter(loader.epoch(0) if isinstance(loader, Loader) else loader)

    before = threads()  # those of other tests may end at any time
    gc.disable()
    try:
        with kind(dataset, 4, crop=CROP, device="cpu", **options) as loader:
            assert threads() <= before  # the loader's begin with the first batch
            taken = batches(loader)
            list(islice(taken, count))
            assert threads() - before
            del taken
        # A thread of Python's remains in the list for a moment after it has been joined.
        wait_until(lambda: threads() <= before)
    finally:
        gc.enable()
    with pytest.raises(LoaderError, match="the loader is closed"):
        next(batches(loader))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_pixels_are_normalised_and_of_the_type_that_was_asked_for(dataset, dtype):
    mean, std = (0, 0, 0), (1, 1, 1)
    with Loader(dataset, BATCH, mean=mean, std=std, **CPU) as loader:
        plain = copies(loader.epoch(0))
    if dtype == torch.uint8:
        chosen: dict = {}
    else:
        mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
        chosen = {"mean": mean, "std": std}
    with Loader(dataset, BATCH, dtype=dtype, **chosen, **CPU) as loader:
        for (pixels, labels), (raw, expected) in zip(loader.epoch(0), plain, strict=True):
            assert pixels.dtype == dtype
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(labels, expected)
            normalised = (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            torch.testing.assert_close(
                pixels.float(), normalised, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-5
            )


def test_an_evaluation_is_normalised_in_the_same_way(dataset):
    normal = {"mean": dataset.mean, "std": dataset.std}
    with (
        EvaluationLoader(dataset, 8, CROP, device="cpu", split="train", **normal) as ours,
        EvaluationLoader(dataset, 8, CROP, device="cpu", split="train", dtype=torch.uint8) as raw,
    ):
        for (pixels, _), (plain, _) in zip(ours, raw, strict=True):
            mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
            torch.testing.assert_close(pixels, (plain - mean) / std, rtol=0, atol=1e-5)


def test_the_standard_deviations_are_those_of_the_pixels(dataset):
    reader = dataset.reader("train")
    images = [np.asarray(Image.open(BytesIO(reader.jpeg(number)))) for number in range(len(reader))]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(float)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=0.01)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("geometry", ["256", "short256", "original"])
def test_a_random_resized_crop_is_what_pillow_makes_of_the_same_part(oblong, tmp_path, geometry, dtype):
    """They differ by rounding, and by the chroma at the edges of a part that is decoded alone.

    A part one pixel away would differ by more than one level on average.
    """
    pack_here("--input", oblong, "--out", tmp_path, "--geometry", geometry, "--size", "100")
    dataset = open_dataset(tmp_path)
    reader = dataset.reader("train")
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    options = {"scale": scale, "dtype": dtype, **CPU, "crop": 48}
    options |= {} if dtype == torch.uint8 else {"mean": (0, 0, 0)}
    with Loader(dataset, 10, **options) as loader:
        shapes = set()
        for step, (pixels, _) in enumerate(loader.batches(0, 20)):
            batch = loader.plan.step_batch(step)
            rows = reader.rows[batch.samples]
            boxes = resized_crops(loader.plan.step_resizes(step), rows["width"], rows["height"], scale, ratio)
            for n, (left, top, width, height) in enumerate(boxes.tolist()):
                image = Image.open(BytesIO(reader.jpeg(batch.samples[n])))
                part = image.crop((left, top, left + width, top + height))
                expected = np.asarray(part.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
                expected = expected[:, :: -1 if batch.draws.mirror[n] else 1]
                difference = abs(pixels[n].permute(1, 2, 0).numpy().astype(int) - expected)
                assert difference[3:-3, 3:-3].max() <= 2
                assert difference.max() <= 16
                assert difference.mean() < 0.5
                shapes.add((width, height))
    assert len(shapes) > 100


def test_random_resized_crops_do_not_depend_on_processes_or_on_where_a_run_continued(dataset):
    options = {"scale": (0.08, 1.0), "colour": "paper", **CPU, "crop": 96}  # larger than the images
    with Loader(dataset, BATCH, **options) as loader:
        whole = copies(loader.batches(0, 9))
    parts = []
    for rank in range(2):
        with Loader(dataset, BATCH, rank=rank, world=2, **options) as loader:
            parts.append(copies(loader.batches(2, 9)))
    together = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]
    assert_same_batches(together, whole[2:])


def test_a_damaged_sample_is_named_and_replaced(packed_copy, reference):
    rows = open_dataset(packed_copy).reader("train").rows
    offset = int(rows["offset"][rows["offset"] > 65536][0])
    with open(packed_copy / "train-000000.tar", "r+b") as file:
        file.seek(offset)
        file.write(bytes(200))
    damages: list[Damage] = []
    for options in ({}, {"scale": (0.08, 1.0)}):
        with Loader(open_dataset(packed_copy), BATCH, on_damage=damages.append, **options, **CPU) as loader:
            assert sum(len(labels) for _, labels in loader.epoch(0)) == 64
    location = f"{packed_copy / 'train-000000.tar'} at byte {offset}"
    assert [damage.location for damage in damages] == [location] * 2
    with Loader(open_dataset(packed_copy), BATCH, **CPU) as loader, pytest.raises(ValueError, match=location):
        list(loader.epoch(0))


@pytest.mark.parametrize("world", [1, 3])
def test_an_evaluation_has_each_image_once(dataset, world):
    labels = []
    for rank in range(world):
        with EvaluationLoader(dataset, 8, CROP, device="cpu", rank=rank, world=world) as loader:
            for _ in range(2):  # the second pass uses the threads of the first one
                batches = list(loader)
                assert len(batches) == len(loader)
            labels += torch.cat([labels for _, labels in batches]).tolist()
    assert labels == dataset.reader("val").rows["label"].tolist()


def test_evaluations_may_be_stopped_and_may_overlap(dataset):
    with EvaluationLoader(dataset, 8, CROP, device="cpu") as loader:
        whole = copies(loader)
        next(iter(loader))
        for both in zip(loader, loader, strict=True):
            assert_same_batches([both[0]], [both[1]])
        assert_same_batches(copies(loader), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crops": 5}, "crops must be 1 or 10, not 5"),
        ({"batch": 0}, "the batch must have 1 image or more, not 0"),
    ],
)
def test_bad_arguments_of_an_evaluation_are_refused(dataset, arguments, message):
    with pytest.raises(LoaderError, match=message):
        EvaluationLoader(dataset, **{"batch": 8, "crop": CROP} | arguments)


def test_ranks_come_from_torchruns_environment(dataset, reference, monkeypatch):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Loader(dataset, BATCH, **CPU) as loader:
        for (_, labels), (_, expected) in zip(loader.epoch(0), reference[0], strict=True):
            assert torch.equal(labels, expected[8:])
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(LoaderError, match="RANK=two in the environment is not a whole number"):
        Loader(dataset, BATCH, **CPU)


def test_ranks_of_torch_distributed_come_before_the_environment(dataset, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with Loader(dataset, BATCH, **CPU) as loader:
        [(_, labels)] = loader.batches(0, 1)
        assert torch.equal(
            labels,
            torch.from_numpy(
                dataset.reader("train").rows["label"][loader.plan.step_samples(0, 3, 4)].astype(np.int64)
            ),
        )


def send_batches(loader: Loader, pipe) -> None:
    """Send the sums of an epoch's pixels, or the error."""
    try:
        pipe.send([float(pixels.double().sum()) for pixels, _ in loader.epoch(0)])
    except LoaderError as error:
        pipe.send(str(error))


@pytest.mark.parametrize(("method", "used"), [("fork", True), ("spawn", False), ("spawn", True)])
def test_a_loader_may_go_to_another_process_unless_that_is_forked_from_its_use(
    dataset, loader, reference, method, used
):
    if used:
        next(iter(loader.epoch(0)))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(target=send_batches, args=(loader, theirs))
    process.start()
    try:
        assert ours.poll(120)
        received = ours.recv()
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    if method == "fork" and used:
        assert received.startswith("a loader was already in use when this process was forked")
    else:
        assert received == [float(pixels.double().sum()) for pixels, _ in reference[0]]
    assert_same_batches(copies(loader.epoch(0)), reference[0])  # it is unharmed


def test_a_data_loader_may_fork_workers_while_a_loader_is_in_use(loader, reference):
    batches = iter(loader.epoch(0))
    first = [tensor.clone() for tensor in next(batches)]
    workers = torch.utils.data.DataLoader(range(8), num_workers=2, multiprocessing_context="fork")
    assert [int(number) for number in workers] == list(range(8))
    assert_same_batches([(first[0], first[1]), *copies(batches)], reference[0])


def test_a_pickled_dataset_opens_the_same_one(dataset):
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint


def test_importing_the_package_is_cheap():
    code = "import sys, pipeline; print(any(name in sys.modules for name in ('torch', 'nvidia', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_can_be_imported():
    import pipeline

    assert all(getattr(pipeline, name) for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Loaders'"):
        pipeline.Loaders  # noqa: B018
