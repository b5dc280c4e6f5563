"""Verifying and inspecting datasets behind URLs, whose credentials no output shows."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.pipeline.packing.faulty_server import Handler
from tests.trees import upload
from tools import verify_shards

pytestmark = pytest.mark.usefixtures("_one_process_verifies")

TAR = "train-000001.tar"
SECRETS = ("me:pass", "pass@", "abcdef")


@pytest.fixture
def memory(packed: Path) -> Iterator[str]:
    """The URL of a copy of the packed pictures in fsspec's file system in memory."""
    upload(packed, "memory://bucket/shards")
    yield "memory://bucket/shards"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def verify(call) -> Callable[..., tuple[int, str, str]]:
    def run(url: str, *arguments: str) -> tuple[int, str, str]:
        done = call(verify_shards.main, "--data", url, *arguments)
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_dataset_behind_a_url_is_verified_like_a_local_one(memory, packed, verify):
    assert verify(memory, "--decode", "all") == verify(packed, "--decode", "all")
    assert verify(f"{memory}/", "--decode", "all")[0] == 0


@pytest.mark.parametrize("decode", ["sampled", "all", "none"])
def test_damage_behind_a_url_is_named_like_damage_of_a_local_dataset(
    memory, packed, tmp_path, verify, decode
):
    root = Path(shutil.copytree(packed, tmp_path / "shards"))
    tar = bytearray((root / TAR).read_bytes())
    tar[len(tar) // 2] ^= 1
    (root / TAR).write_bytes(tar)
    (root / "train-000000.tar").write_bytes((root / "train-000000.tar").read_bytes()[:5000])
    (root / "train-000002.idx").unlink()
    (root / "stray.tar").touch()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    upload(root, memory)
    local = verify(root, "--decode", decode)
    assert local[0] == 1
    assert verify(memory, "--decode", decode) == local


def test_indices_behind_a_url_are_not_repaired(memory, verify):
    code, out, error = verify(memory, "--repair-index")
    assert (code, out) == (1, "")
    refusal = "--repair-index works only on a local folder: copy the dataset to one first"
    assert error == f"verify-shards: {refusal}\n"


class RangeHandler(Handler):
    """Serves parts of files, too."""

    def send(self, content: bytes, length: int | None = None) -> None:
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    do_HEAD = Handler.do_GET  # noqa: N815 – named by http.server
