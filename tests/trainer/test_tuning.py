"""The search for the fastest decoding, whose real result needs a GPU, and its cache."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.loader import Dataset, Decoding
from pipeline.stream import DecodingMemoryError
from trainer import tuning
from trainer.processes import distributed
from trainer.settings import Settings

ENTRY = {"pipelines": 2, "hw_decoder_load": 0.5, "threads": 6}  # in the cache of `on_gpu`


@pytest.fixture
def dataset(packed):
    return Dataset(packed)


SETTINGS = Settings(batch=12)


def test_each_choice_is_made_with_the_best_of_the_choices_before_it():
    tried = []

    def images_per_second(decoding: Decoding) -> float:
        tried.append((decoding.threads, decoding.hw_decoder_load))
        return 100 - abs(decoding.threads - 6) - 50 * abs(decoding.hw_decoder_load - 0.8)

    choices = {"pipelines": (2,), "hw_decoder_load": (0.65, 0.8, 1.0), "threads": (8, 6, 4)}
    best = tuning.fastest(Decoding(threads=8), choices, images_per_second)
    assert (best.pipelines, best.threads, best.hw_decoder_load) == (2, 6, 0.8)
    assert tried == [(8, 0.65), (8, 0.8), (8, 1.0), (8, 0.8), (6, 0.8), (4, 0.8)]


def test_a_loader_is_measured_for_long_enough_on_separate_batches(dataset, monkeypatch):
    def measure_throughput(work, seconds: float, device) -> float:
        assert seconds >= 0.5
        assert device == Decoding.device
        return float(sum(work() for _ in range(6)))  # more than an epoch, which has five batches

    monkeypatch.setattr(tuning, "measure_throughput", measure_throughput)
    world = distributed.World(0, 1, 0, Decoding.device)
    assert tuning.measure(Decoding(crop=67), SETTINGS, dataset, world) == 72.0


def test_the_first_share_of_the_engine_is_zero():
    assert tuning.ENGINE_SHARES[0] == 0.0


def test_without_a_gpu_nothing_is_measured(dataset, monkeypatch):
    monkeypatch.setattr(tuning, "measure", None)
    world = distributed.join("cpu")
    assert tuning.tune(Decoding(67), SETTINGS, dataset, world) == (Decoding(67), [])


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """Pretend to use a GPU that is fastest with two pipelines of six threads and half of its engine.

    Returns its measurements.
    """
    measured = []

    def measure(decoding, *_):
        measured.append(decoding)
        distances = (decoding.threads - 6, decoding.hw_decoder_load - 0.5, decoding.pipelines - 2)
        return -sum(map(abs, distances))

    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(distributed.World, "device_name", "a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return measured


def cuda(local_rank: int = 0):
    device = torch.device("cuda", local_rank)
    return distributed.World(local_rank, 1, local_rank, device), Decoding(67, device, threads=8)


def test_the_result_is_remembered_for_this_machine_and_dataset(on_gpu, dataset):
    world, decoding = cuda()
    first = tuning.tune(decoding, SETTINGS, dataset, world)
    assert first == (
        replace(decoding, pipelines=2, threads=6, hw_decoder_load=0.5),
        ["decoding in 2 pipelines of 6 threads, 50% on the JPEG engine"],
    )
    measured = len(on_gpu)
    assert tuning.tune(decoding, SETTINGS, dataset, world) == first
    assert len(on_gpu) == measured
    tuning.tune(decoding, Settings(batch=6), dataset, world)
    assert len(on_gpu) > measured


def test_a_decoding_that_needs_too_much_memory_is_not_chosen(on_gpu, dataset, monkeypatch):
    measure = tuning.measure

    def with_little_memory(decoding, *rest):
        if decoding.pipelines == 2:
            raise DecodingMemoryError("no room for a second pipeline")
        return 100 + measure(decoding, *rest)

    monkeypatch.setattr(tuning, "measure", with_little_memory)
    world, decoding = cuda()
    with pytest.warns(UserWarning, match="pipelines=2.*DecodingMemoryError: no room for a second pipeline"):
        chosen, _ = tuning.tune(decoding, SETTINGS, dataset, world)
    assert (chosen.pipelines, chosen.threads, chosen.hw_decoder_load) == (1, 6, 0.5)


def test_fixed_settings_are_not_tuned(on_gpu, dataset):
    world, decoding = cuda()
    settings = Settings(threads=8, hw_decoder_load=0.65, pipelines=1)
    assert tuning.tune(decoding, settings, dataset, world) == (decoding, [])
    settings = Settings(hw_decoder_load=0.65)
    chosen, _ = tuning.tune(decoding, settings, dataset, world)
    assert (chosen.threads, chosen.hw_decoder_load) == (6, 0.65)


def test_a_damaged_cache_is_rewritten_by_one_process_of_the_machine(on_gpu, dataset, tmp_path):
    path = tmp_path / "alexnet-train" / "decoding.json"
    path.parent.mkdir()
    path.write_text('{"cut')
    world, decoding = cuda(local_rank=1)
    assert tuning.tune(decoding, SETTINGS, dataset, world)[0].threads == 6
    assert path.read_text() == '{"cut'
    world, decoding = cuda()
    tuning.tune(decoding, SETTINGS, dataset, world)
    assert list(json.loads(path.read_text()).values()) == [ENTRY]


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"threads": 6},
        {**ENTRY, "threads": 0},
        {**ENTRY, "pipelines": 0},
        {**ENTRY, "hw_decoder_load": 2},
    ],
)
def test_a_damaged_entry_is_measured_again(on_gpu, dataset, tmp_path, entry):
    world, decoding = cuda()
    first = tuning.tune(decoding, SETTINGS, dataset, world)
    path = tmp_path / "alexnet-train" / "decoding.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), entry)))
    assert tuning.tune(decoding, SETTINGS, dataset, world) == first


def test_an_unwritable_cache_is_reported_and_does_no_harm(on_gpu, dataset, tmp_path):
    (tmp_path / "alexnet-train").write_text("in the way")
    world, decoding = cuda()
    chosen, notes = tuning.tune(decoding, SETTINGS, dataset, world)
    assert chosen.threads == 6
    assert notes[1].startswith("measured again at the next start, as this cannot be cached: ")


def test_a_user_without_a_home_directory_is_told_and_can_train(on_gpu, dataset, monkeypatch):
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    chosen, notes = tuning.tune(cuda()[1], SETTINGS, dataset, cuda()[0])
    assert chosen.threads == 6
    assert "this user has no home directory: set XDG_CACHE_HOME" in notes[1]


def test_an_unreadable_cache_is_not_replaced(on_gpu, dataset, tmp_path, monkeypatch):
    path = tmp_path / "alexnet-train" / "decoding.json"
    path.parent.mkdir()
    path.write_text('{"another": {}}')

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.files.read_fully", stale)
        chosen, notes = tuning.tune(cuda()[1], SETTINGS, dataset, cuda()[0])
    assert chosen.threads == 6
    assert f"{path}: Stale file handle" in notes[1]
    assert path.read_text() == '{"another": {}}'
