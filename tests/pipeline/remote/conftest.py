"""Fixtures of the tests of remote datasets."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pipeline.loader
from pipeline.dataset import Dataset, open_dataset
from pipeline.remote.samples import Samples
from pipeline.stream import Stream
from tests.bucket import Bucket, serving
from tests.trees import pack_here


@pytest.fixture(scope="session")
def many_shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn pictures, packed at 80×80 px: 60 of train in twelve shards and 20 of val in four."""
    output = tmp_path_factory.mktemp("many")
    pack_here("--input", pictures, "--out", output, "--size", "80", "--shard-samples", "5")
    return output


@pytest.fixture
def _whole_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all samples wait for their shards."""
    monkeypatch.setattr(Samples, "room", 0)


@pytest.fixture
def _short_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have loaders plan twelve images ahead, instead of several epochs of these datasets."""
    monkeypatch.setattr(Stream, "look_ahead", 12)
    monkeypatch.setattr(pipeline.loader, "BLOCK_IMAGES", 12)


@pytest.fixture
def bucket(many_shards: Path) -> Iterator[Bucket]:
    with serving(many_shards) as bucket:
        yield bucket


@pytest.fixture
def remote(bucket: Bucket, tmp_path: Path) -> Iterator[Callable[..., Dataset]]:
    """remote(size): open the dataset in the bucket with a cache of this size."""
    opened = []

    def open_in_bucket(size: str = "1GB") -> Dataset:
        opened.append(open_dataset(bucket.url, tmp_path / "cache", size))
        return opened[-1]

    yield open_in_bucket
    for dataset in opened:
        assert dataset.storage is not None
        dataset.storage.close()  # or its threads would ask a server that is gone, and say so in other tests
