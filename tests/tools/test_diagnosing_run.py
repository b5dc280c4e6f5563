"""What the doctor finds out about the dataset, the run folder and the ports."""

import os
import resource
import socket

import pytest

from pipeline.dataset import Dataset
from pipeline.files import close_quietly
from pipeline.mixture import read_data
from pipeline.reader import ShardReader
from tools.diagnosing import preparation
from tools.diagnosing.findings import Finding
from tools.diagnosing.preparation import Data
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_the_dataset_is_described_and_read_from_its_disk(packed):
    dataset = Dataset(packed)
    data = preparation.measure_data(dataset)
    assert (data.train, data.val, data.stays_in_memory) == (60, 20, True)
    assert data.image_bytes == dataset.reader("train").rows["size"].sum() / 60
    assert data.cold > 0
    found = by_subject(preparation.describe(Settings(data=packed), dataset, data))
    assert "60 training and 20 validation images in 10 classes; shorter side 80 px" in found["dataset"].text
    assert "only in the first epoch" in found["disk"].text
    assert {each.status for each in found.values()} == {"ok"}


def test_images_are_read_from_the_disk_once_for_some_time(packed, monkeypatch):
    reader, read = Dataset(packed).reader("train"), []
    monkeypatch.setattr(
        ShardReader, "read", lambda _, batch: read.append(batch) or reader_read(reader, batch)
    )
    preparation.read_cold(reader)
    assert sorted(number for batch in read for number in batch) == list(range(60))
    read.clear()
    monkeypatch.setattr(preparation, "_BATCH", 10)
    preparation.read_cold(reader, seconds=0)
    assert [len(batch) for batch in read] == [10]


reader_read = ShardReader.read


@pytest.mark.slow
def test_a_cache_smaller_than_a_dataset_in_a_bucket_is_noted(packed_url, tmp_path):
    sizes = {"200GB": "ok", "300kB": "note"}
    for cache_size, status in sizes.items():
        settings = Settings(
            data=packed_url, cache=tmp_path / "cache", cache_size=cache_size, shuffle_window=1
        )
        dataset = Dataset(settings.data, cache=settings.cache_options)
        data = preparation.measure_data(dataset)
        found = by_subject(preparation.describe(settings, dataset, data))
        dataset.storage.close()
        assert (data.train, data.cold) == (60, None)
        assert list(found) == ["dataset", "cache"]
        assert found["cache"].status == status
    assert "--cache-size" in found["cache"].remedy


def test_too_low_a_limit_on_open_files_is_a_problem(packed, monkeypatch):
    dataset, data = Dataset(packed), Data(60, 20)
    dataset.reader("train"), dataset.reader("val")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    found = by_subject(preparation.describe(Settings(data=packed), dataset, data))["open files"]
    assert found.status == "problem"
    assert "all 4 shards" in found.text


@pytest.mark.usefixtures("_larger_than_memory")
def test_a_dataset_larger_than_memory_is_read_in_each_epoch(packed):
    dataset = Dataset(packed)
    found = by_subject(preparation.describe(Settings(data=packed), dataset, Data(60, 20, cold=1e6)))
    assert "delivers 1 MB/s" in found["disk"].text
    assert "in each epoch" in found["disk"].text


def test_a_free_run_folder_one_to_continue_and_those_of_other_runs(packed, tmp_path):
    settings = Settings(data=packed, out=tmp_path / "runs" / "a", crop=67, batch=12)
    [found] = preparation.run_folder(settings, has_data=True)
    assert "is free" in found.text
    lock = Run(settings.run_folder).begin(settings, read_data(packed))
    with pytest.raises(RunError, match="is being trained by process"):
        list(preparation.run_folder(settings, has_data=True))
    close_quietly(lock)
    [found] = preparation.run_folder(settings, has_data=True)
    assert "would be continued" in found.text
    with pytest.raises(SettingsError, match="another run, which differs in batch"):
        list(preparation.run_folder(settings.model_copy(update={"batch": 6}), has_data=True))


def test_a_run_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    [found] = preparation.run_folder(Settings(out=tmp_path / "a" / "b"), has_data=False)
    assert found.status == "problem"
    assert found.text == f"{tmp_path} cannot be written"


@pytest.mark.parametrize(
    ("free", "status", "remedy"),
    [(4e8, "ok", ""), (3.9e8, "problem", "--keep-checkpoints 1"), (2.9e8, "problem", "free the disk")],
)
def test_checkpoints_need_space_for_those_kept_the_best_and_the_next(
    tmp_path, monkeypatch, free, status, remedy
):
    usage = type("usage", (), {"free": int(free)})
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: usage)
    [found] = preparation.space(Settings(out=tmp_path / "run"), checkpoint_bytes=10**8)
    assert found.status == status
    assert remedy in found.remedy


def test_checkpoints_that_are_there_already_need_no_more_space(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: type("usage", (), {"free": 300}))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000000001.pt").write_bytes(bytes(100))
    [found] = preparation.space(Settings(out=tmp_path), checkpoint_bytes=100)
    assert found.status == "ok"


def test_ports_in_use_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = Settings(address="127.0.0.1", port=port)
        with pytest.raises(SettingsError, match=f"port {port} is in use: choose another"):
            list(preparation.ports(taken, 1))
        with pytest.raises(SettingsError, match=f"port {port} is in use"):
            list(preparation.ports(taken.model_copy(update={"port": port - 1}), 2))
    [found] = preparation.ports(taken, 1)
    assert found.text == f"{port}: free"
    [found] = preparation.ports(Settings(port=0), 8)
    assert found.text == "none: --port 0"
