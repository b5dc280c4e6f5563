"""dataset.json: written whole, read back equal, and refused with advice where it cannot be used."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.manifest import (
    MAX_BYTES,
    Class,
    DatasetError,
    Manifest,
    Pixels,
    Shard,
    Split,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def manifest() -> Manifest:
    shards = [
        Shard(file=f"train-{n}.tar", samples=9, bytes=10240, sha256="a", head_sha256="b") for n in (0, 1)
    ]
    return Manifest(
        format=1,
        geometry="short256",
        size=256,
        max_width=500,
        max_height=400,
        classes=[Class(id="n01440764", name="tench"), Class(id="n02086240", name="Shih-Tzu – 西施犬")],
        splits={"train": Split(samples=18, index="train.index.npy", index_sha256="c", shards=shards)},
        pixels=Pixels(
            mean=(127.3, 119.7, 104.9), eigenvalues=(3.1, 2.0, 0.1), eigenvectors=[[0.1, 0.2, 0.3]] * 3
        ),
        packed={"by": "a test", "quality": 90, "fraction": 0.1},
        repaired={"rotated": 2},
        rejected={"empty": 1},
    )


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_manifest(root)
    return str(caught.value)


def test_what_is_written_is_read_back(manifest, tmp_path):
    write_manifest(tmp_path, manifest)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_the_same_manifest_gives_the_same_bytes(manifest, tmp_path):
    write_manifest(tmp_path, manifest)
    first = (tmp_path / "dataset.json").read_bytes()
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / "dataset.json").read_bytes() == first


def test_fields_of_later_versions_are_left_alone(manifest, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(manifest.model_dump() | {"licence": "CC0"}))
    assert read_manifest(tmp_path) == manifest


def test_splits_are_found_by_name(manifest):
    assert manifest.split("train").samples == 18
    with pytest.raises(DatasetError, match="no split 'test'; it has: train"):
        manifest.split("test")


def test_an_absent_folder(tmp_path):
    message = refusal(tmp_path / "none")
    assert f"no dataset at {tmp_path / 'none'}: the folder does not exist" in message
    assert f"alexnet-train make-shards --input IMAGES --out {tmp_path / 'none'}" in message


def test_a_folder_without_a_manifest(tmp_path):
    message = refusal(tmp_path)
    assert f"no dataset at {tmp_path}: the folder has no dataset.json" in message
    assert f"alexnet-train make-shards --input IMAGES --out {tmp_path}" in message


def test_a_newer_format(manifest, tmp_path):
    content = manifest.model_dump() | {"format": 2, "size": "of another kind"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    message = refusal(tmp_path)
    assert f"{tmp_path / 'dataset.json'} has format 2" in message
    assert "upgrade alexnet-train" in message


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b'"\xff"', b'{"format": 1, '])
def test_what_is_not_json(content, tmp_path):
    (tmp_path / "dataset.json").write_bytes(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'dataset.json'} is not valid JSON" in message
    assert "Pack the dataset again" in message


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}"])
def test_json_of_something_else(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'dataset.json'} is not a valid dataset.json" in message
    assert "Pack the dataset again" in message


def test_a_file_that_would_fill_the_memory(tmp_path):
    with open(tmp_path / "dataset.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole, which takes no disk
    assert "so it is not a dataset.json" in refusal(tmp_path)


WRONG = {
    "format": 0,
    "geometry": "224",
    "size": 0,
    "max_width": "wide",
    "max_height": 65536,
    "classes.0.name": None,
    "splits.train.samples": -1,
    "splits.train.shards.1.bytes": 0.5,
    "splits.train.shards.0.file": "../elsewhere.tar",
    "splits.train.index": "/elsewhere.npy",
    "pixels.mean": [1, 2],
    "rejected.empty": -1,
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_named(field, manifest, tmp_path):
    content = json.loads(json.dumps(manifest.model_dump()))
    *path, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    parent = content
    for key in path:
        parent = parent[key]
    parent[last] = WRONG[field]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    message = refusal(tmp_path)
    assert re.search(
        rf"{re.escape(str(tmp_path / 'dataset.json'))} is not a valid dataset.json: {field}\b", message
    )
    assert "Pack the dataset again" in message


def changed_leaves(value: Any, key: str = "") -> Iterator[Any]:
    """The value with one leaf changed at a time to another that is valid in its place."""
    if isinstance(value, dict):
        for k, inner in value.items():
            yield from (value | {k: other} for other in changed_leaves(inner, k))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], other, *value[place + 1 :]] for other in changed_leaves(inner))
    elif key == "geometry":
        yield "original"
    elif key != "format":  # of which there is but one
        yield value + "x" if isinstance(value, str) else value + 1


def test_any_difference_is_another_fingerprint(manifest):
    content = json.loads(json.dumps(manifest.model_dump()))
    fingerprints = [Manifest.model_validate(other).fingerprint for other in changed_leaves(content)]
    assert len(fingerprints) > 30
    assert len({manifest.fingerprint, *fingerprints}) == len(fingerprints) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in fingerprints)
