"""dataset.json is written whole, read back equal, and refused with advice if it cannot be used."""

import json
import math
import re
from collections.abc import Iterator
from hashlib import sha256
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
        splits={
            "train": Split(
                samples=18,
                index="train.index.npy",
                index_sha256="c",
                shards=shards,
                checksums="train.checksums.npy",
                checksums_sha256="d",
            )
        },
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


def test_a_manifest_is_read_back_equal_and_rewritten_byte_for_byte(manifest, tmp_path):
    write_manifest(tmp_path, manifest)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
    first = (tmp_path / "dataset.json").read_bytes()
    write_manifest(tmp_path, again)
    assert (tmp_path / "dataset.json").read_bytes() == first


def test_unknown_fields_of_later_versions_are_ignored(manifest, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(manifest.model_dump() | {"licence": "CC0"}))
    assert read_manifest(tmp_path) == manifest


def test_a_dataset_packed_before_samples_had_checksums_keeps_its_file_and_fingerprint(manifest, tmp_path):
    content = json.loads(json.dumps(manifest.model_dump()))
    for split in content["splits"].values():
        del split["checksums"], split["checksums_sha256"]
    (tmp_path / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
    before, old = (tmp_path / "dataset.json").read_bytes(), read_manifest(tmp_path)
    compact = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    assert old.fingerprint == sha256(compact.encode()).hexdigest()[:16]
    write_manifest(tmp_path, old)
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_splits_are_found_by_name(manifest):
    assert manifest.split("train").samples == 18
    with pytest.raises(DatasetError, match="no split 'test'; it has: train"):
        manifest.split("test")


@pytest.mark.parametrize(("name", "reason"), [("none", "does not exist"), (".", "has no dataset.json")])
def test_the_command_that_packs_is_named_if_there_is_no_dataset(tmp_path, name, reason):
    message = refusal(tmp_path / name)
    assert f"no dataset at {tmp_path / name}: the folder {reason}" in message
    assert f"alexnet-train make-shards --input IMAGES --out {tmp_path / name}" in message


def test_a_newer_format_asks_for_an_upgrade(manifest, tmp_path):
    content = manifest.model_dump() | {"format": 2, "size": "of another kind"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    message = refusal(tmp_path)
    assert f"{tmp_path / 'dataset.json'} has format 2" in message
    assert "upgrade alexnet-train" in message


OTHER_CONTENT = {
    b"": "is not valid JSON (it is empty)",
    **dict.fromkeys([b"{", b"<html>", b'{"format": 1, '], "is not valid JSON"),
    b'"\xff"': "is not in UTF-8",
    **dict.fromkeys([b"[]", b"3", b"null"], "is not valid: not a JSON object"),
    b"{}": "is not valid: format",
}


@pytest.mark.parametrize("content", OTHER_CONTENT)
def test_other_content_is_refused_with_advice(content, tmp_path):
    (tmp_path / "dataset.json").write_bytes(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'dataset.json'} {OTHER_CONTENT[content]}" in message
    assert message.endswith("Copy the dataset again, or pack it again")


def test_a_huge_file_is_refused(tmp_path):
    with open(tmp_path / "dataset.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse, so it takes no disk space
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
    "splits.train.checksums": "../elsewhere.npy",
    "pixels.mean": [1, 2],
    "pixels.eigenvalues.0": math.inf,
    "classes": [],
    "splits": {},
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
    assert re.search(rf"{re.escape(str(tmp_path / 'dataset.json'))} is not valid: {field}\b", message)
    assert message.endswith("Copy the dataset again, or pack it again")


def changed_leaves(value: Any, key: str = "") -> Iterator[Any]:
    """Yield the value with one leaf at a time replaced by another valid one."""
    if isinstance(value, dict):
        for k, inner in value.items():
            yield from (value | {k: other} for other in changed_leaves(inner, k))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from ([*value[:n], other, *value[n + 1 :]] for other in changed_leaves(inner))
    elif key == "geometry":
        yield "original"
    elif key != "format":  # which has only one valid value
        yield value + "x" if isinstance(value, str) else value + 1


def test_every_change_of_a_manifest_changes_its_fingerprint(manifest):
    content = json.loads(json.dumps(manifest.model_dump()))
    fingerprints = [Manifest.model_validate(other).fingerprint for other in changed_leaves(content)]
    assert len(fingerprints) > 30
    assert len({manifest.fingerprint, *fingerprints}) == len(fingerprints) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in fingerprints)
