"""verify-shards: all damage is found and named, and sound files are not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import DatasetError, read_manifest
from pipeline.shards import write_array
from tests.helpers import REPO
from tests.trees import contents
from tools import verify_shards
from tools.verify_shards import repair, verify

pytestmark = pytest.mark.usefixtures("_one_process_verifies")

TAR = "train-000001.tar"  # samples 20 to 39 of train


@pytest.fixture
def run(call) -> Callable[..., subprocess.CompletedProcess]:
    """run(data, *arguments): run the command in this process."""
    return lambda data, *arguments: call(verify_shards.main, "--data", data, *arguments)


@pytest.fixture
def dataset(packed: Path, tmp_path: Path) -> Path:
    """A copy that tests may damage: train has three shards of 20 samples, val one of 20."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def found_in(root: Path, decode: str = "sampled") -> list[str]:
    verdict = verify(root, decode, 1)
    assert verdict.count == len(verdict.problems)
    return [str(problem) for problem in verdict.problems]


def test_a_sound_dataset_passes(packed):
    before = contents(packed)
    command = [sys.executable, "tools/verify_shards.py", "--data", packed, "--workers", "2"]
    done = subprocess.run(
        [*command, "--decode", "all"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    header, train, val, last = done.stdout.splitlines()
    assert header.split() == ["split", "shards", "damaged", "samples", "decoded", "bytes"]
    sizes = {n: sum(p.stat().st_size for p in packed.glob(f"{n}-*.tar")) for n in ("train", "val")}
    assert train.split() == ["train", "3", "0", "60", "60", f"{sizes['train']:,}"]
    assert val.split() == ["val", "1", "0", "20", "20", f"{sizes['val']:,}"]
    assert last == "sound"
    assert contents(packed) == before


@pytest.mark.parametrize(("decode", "expected"), [("none", 0), ("sampled", 40), ("all", 80)])
def test_decode_controls_how_many_pictures_are_decoded(packed, decode, expected):
    verdict = verify(packed, decode, 1)
    assert sum(row.decoded for row in verdict.splits.values()) == expected
    assert not verdict.count


def test_every_shard_and_its_idx_must_exist(dataset):
    (dataset / TAR).unlink()
    (dataset / "train-000002.idx").unlink()
    assert found_in(dataset) == [f"{TAR}: is missing", "train-000002.idx: is missing"]


def test_pictures_larger_than_dataset_json_says_are_named(dataset):
    with_manifest(dataset, lambda content: content.update(max_width=79))
    indices = ("train.index.npy", "val.index.npy")
    assert found_in(dataset) == [
        f"dataset.json: says that no width exceeds 79, but {index} has 80" for index in indices
    ]


def with_rows(root: Path, change: Callable[[np.ndarray], None]) -> None:
    """Replace the index of train by what `change` returns, and update dataset.json."""
    rows = np.load(root / "train.index.npy")
    change(rows)
    digest = write_array(root / "train.index.npy", rows)
    with_manifest(root, lambda content: content["splits"]["train"].update(index_sha256=digest))


def test_the_index_of_another_dataset_is_refused(dataset):
    shutil.copy(dataset / "val.index.npy", dataset / "train.index.npy")
    (line,) = found_in(dataset)
    assert line.startswith("train.index.npy: the index ")
    assert "does not match its checksum in dataset.json" in line


@pytest.mark.parametrize("damage", ["is missing", "does not match its checksum in dataset.json"])
def test_a_damaged_file_of_checksums_is_named(dataset, damage):
    path = dataset / "train.checksums.npy"
    path.unlink() if damage == "is missing" else shutil.copy(dataset / "val.checksums.npy", path)
    (line,) = found_in(dataset)
    assert line.startswith(f"train.checksums.npy: the checksum file {path} {damage}")


def test_a_dataset_without_checksums_is_sound(dataset):
    def remove(content: dict) -> None:
        for split in content["splits"].values():
            (dataset / split.pop("checksums")).unlink()
            del split["checksums_sha256"]

    with_manifest(dataset, remove)
    assert found_in(dataset, "all") == []
    before = contents(dataset)
    assert repair(dataset, 1) == []
    assert contents(dataset) == before


def test_stray_files_are_named(dataset):
    strays = ("train-000003.tar", "train-000003.idx", "more.index.npy", "a.checksums.npy", ".a.tar.partial")
    for name in strays:
        (dataset / name).write_bytes(b"")
    said = "is not named by dataset.json: delete it, or move it elsewhere"
    assert found_in(dataset) == [f"{name}: {said}" for name in sorted(strays)]


def with_manifest(root: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((root / "dataset.json").read_bytes())
    change(content)
    (root / "dataset.json").write_text(json.dumps(content))


def named(dataset: Path, name: str) -> Iterator[None]:
    """Yield twice: once with the index of train under this name, and once with a shard."""
    for change in (
        lambda split: split.update(index=name),
        lambda split: split["shards"][0].update(file=name),
    ):
        before = (dataset / "dataset.json").read_text()
        with_manifest(dataset, lambda content, change=change: change(content["splits"]["train"]))
        yield
        (dataset / "dataset.json").write_text(before)


@pytest.mark.parametrize("name", ["", "..", "../val-000000.tar", "/etc/passwd"])
def test_paths_that_leave_the_folder_are_refused(dataset, name):
    for _ in named(dataset, name):
        with pytest.raises(DatasetError, match="is not in the dataset's folder"):
            found_in(dataset)


@pytest.mark.parametrize("name", ["a\0.tar", "\ud800.tar", "train.tgz"])
def test_names_that_packing_never_writes_are_damage(dataset, name):
    for _ in named(dataset, name):
        assert f"dataset.json: names {name!a}, which is not a file in its folder" in found_in(dataset)


def test_sums_in_dataset_json_must_agree(dataset):
    with_manifest(dataset, lambda content: content["splits"]["train"].update(samples=61))
    assert found_in(dataset) == ["dataset.json: says that train has 61 samples, but its shards have 60"]


def test_one_shard_under_two_names_is_found(dataset):
    def change(content: dict) -> None:
        shards = content["splits"]["train"]["shards"]
        shards[1] = shards[0]

    with_manifest(dataset, change)
    assert found_in(dataset)[0] == "dataset.json: names train-000000.tar twice"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe garbage", b"[" * 10**5, b"{}", b"[]", b'{"format": 2}'])
def test_garbage_in_dataset_json_is_reported_in_one_line(dataset, content, run):
    (dataset / "dataset.json").write_bytes(content)
    done = run(dataset)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("verify-shards: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_dataset_is_reported_in_one_line(tmp_path, run):
    done = run(tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr == f"verify-shards: {error_of(tmp_path / 'none')}\n"


def error_of(root: Path) -> str:
    with pytest.raises(DatasetError) as error:
        read_manifest(root)
    return str(error.value)


def test_findings_are_printed_up_to_a_limit_and_counted(dataset, run):
    def change(rows: np.ndarray) -> None:
        rows["width"] -= 1
        rows["height"] -= 1
        rows["label"] = 9 - rows["label"]

    with_rows(dataset, change)
    (dataset / "val.index.npy").unlink()
    done = run(dataset)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[1].split()[:4] == ["train", "3", "3", "60"]
    for shard in range(3):
        assert sum(line.startswith(f"train-{shard:06d}.tar, ") for line in lines) == 20
    assert lines[-3:] == ["and 120 more", "", "damaged; problems found: 181"]


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_are_found_without_a_traceback(packed, tmp_path, seed):
    """Changes to dataset.json need not be found, because it has no checksum of its own."""
    rng = np.random.default_rng(seed)
    for path in sorted(packed.iterdir()):
        if path.name == "report.tsv":
            continue
        root = Path(shutil.copytree(packed, tmp_path / path.name))
        content = bytearray(path.read_bytes())
        offset = int(rng.integers(len(content)))
        kind = rng.choice(["flip", "cut", "insert", "zeros"])
        if kind == "flip":
            content[offset] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del content[offset:]
        elif kind == "insert":
            content[offset:offset] = rng.bytes(int(rng.integers(1, 600)))
        else:
            content[offset : offset + 4096] = bytes(len(content[offset : offset + 4096]))
        (root / path.name).write_bytes(content)
        same = bytes(content) == path.read_bytes()  # zeros over zeros
        try:
            verdict = verify(root, "all", 1)
        except (DatasetError, RecursionError):
            assert path.name == "dataset.json"
        else:
            assert verdict.count or same or path.name == "dataset.json", f"{kind} at {offset} of {path.name}"
        shutil.rmtree(root)


DAMAGED_INDICES = {
    "nothing": lambda _: None,
    "no idx": lambda root: (root / "train-000001.idx").unlink(),
    "a wrong idx": lambda root: (root / "val-000000.idx").write_text("v1.2 0\n"),
    "no index": lambda root: (root / "train.index.npy").unlink(),
    "another index": lambda root: shutil.copy(root / "val.index.npy", root / "train.index.npy"),
    "no checksums": lambda root: (root / "val.checksums.npy").unlink(),
    "other checksums": lambda root: shutil.copy(root / "val.checksums.npy", root / "train.checksums.npy"),
    "all of it": lambda root: [path.unlink() for path in root.iterdir() if path.suffix in (".idx", ".npy")],
}


@pytest.mark.parametrize("damage", DAMAGED_INDICES)
def test_repair_restores_the_packed_files_exactly(dataset, damage):
    before = contents(dataset)
    DAMAGED_INDICES[damage](dataset)
    lost = sorted(name for name, content in before.items() if contents(dataset).get(name) != content)
    assert sorted(repair(dataset, 1)) == lost
    assert contents(dataset) == before


def test_repair_updates_dataset_json_for_a_wrongly_packed_index(dataset):
    before = contents(dataset)

    def change(rows: np.ndarray) -> None:
        rows["label"][7] ^= 1

    with_rows(dataset, change)
    assert len(found_in(dataset)) == 1
    assert repair(dataset, 1) == ["train.index.npy", "dataset.json"]
    assert contents(dataset) == before


def test_repair_refuses_a_damaged_tar(dataset, run):
    (dataset / "train.index.npy").unlink()
    (dataset / "val-000000.idx").unlink()
    tar = bytearray((dataset / TAR).read_bytes())
    tar[len(tar) // 2] ^= 1
    (dataset / TAR).write_bytes(tar)
    before = contents(dataset)
    done = run(dataset, "--repair-index")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("verify-shards: nothing can be repaired because of these problems:\n  ")
    assert f"{TAR}: its sha256 differs from the one in dataset.json" in done.stderr
    assert contents(dataset) == before


def test_the_command_suggests_and_performs_the_repair_of_indices(dataset, run):
    (dataset / "train-000000.idx").unlink()
    (dataset / "train.index.npy").unlink()
    done = run(dataset)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("no tar is damaged: --repair-index")
    done = run(dataset, "--repair-index")
    assert (done.returncode, done.stdout) == (0, "written: train-000000.idx, train.index.npy\n")
    done = run(dataset, "--repair-index")
    assert (done.returncode, done.stdout) == (0, "nothing to repair\n")
    done = run(dataset, "--repair-index", "--decode", "all")
    assert done.returncode == 2
    assert "--decode has no effect with --repair-index" in done.stderr
    assert run(dataset).returncode == 0


def test_the_repair_of_indices_is_not_suggested_for_stray_files(dataset, run):
    (dataset / "extra.idx").touch()
    done = run(dataset)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "damaged; problems found: 1"
    (dataset / "train.index.npy").unlink()
    assert run(dataset).stdout.splitlines()[-1].startswith("no tar is damaged: --repair-index")


@pytest.mark.parametrize("name", ["bytes", "samples"])
def test_sizes_that_no_file_can_have_are_refused(dataset, run, name):
    with_manifest(dataset, lambda content: content["splits"]["train"]["shards"][0].update({name: 10**30}))
    done = run(dataset)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"shards.0.{name}" in done.stderr
    assert "Traceback" not in done.stderr
