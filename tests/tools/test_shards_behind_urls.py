"""Verifying and inspecting datasets behind URLs, whose credentials no output shows."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.packing.options import PackingOptions
from pipeline.packing.planning import describe_plan
from pipeline.remote_errors import redact
from tests.helpers import free_port
from tests.pipeline.packing.faulty_server import FaultyServer, Handler, serving, status
from tests.trees import contents, upload
from tools import inspect_shards, make_shards, verify_shards

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


# Messages: one line each, without credentials.


class RangeHandler(Handler):
    """Serves parts of files, too."""

    def send(self, content: bytes, length: int | None = None) -> None:
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = Handler.do_GET  # noqa: N815 – named by http.server


@pytest.fixture
def server(packed) -> Iterator[FaultyServer]:
    """A web server of the packed pictures in /shards/."""
    with serving(RangeHandler) as server:
        server.files = {f"/shards/{name}": content for name, content in contents(packed).items()}
        yield server


def signed(server: FaultyServer) -> str:
    """Return the URL of the dataset with a password and a signature."""
    url = server.url.replace("http://", "http://me:pass@")
    return f"{url}/shards?X-Amz-Signature=abcdef&id=1"


@pytest.fixture(params=[verify_shards, inspect_shards], ids=["verify", "inspect"])
def refusal(request, call, tmp_path, monkeypatch) -> Callable[[str], str]:
    """refusal(url): run a command, which must fail, and return its message."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    more = ("--out", tmp_path / "report") if request.param is inspect_shards else ()

    def run(url: str) -> str:
        done = call(request.param.main, "--data", url, *more)
        assert done.returncode == 1
        output = done.stdout + done.stderr
        assert not any(secret in output for secret in SECRETS)
        assert "Traceback" not in output
        return output

    return run


def test_a_signed_url_is_used_for_each_file(server, packed, verify):
    assert verify(signed(server), "--decode", "all") == verify(packed, "--decode", "all")
    assert {path.partition("?")[2] for path in server.requests} == {"X-Amz-Signature=abcdef&id=1"}


@pytest.mark.parametrize("file", ["dataset.json", "train.index.npy", TAR])
@pytest.mark.parametrize(("code", "reason"), [(403, "HTTP 403"), (503, "HTTP 503")])
def test_a_refused_file_is_named_without_credentials(server, refusal, file, code, reason):
    server.faults[f"/shards/{file}"] = status(code)
    message = refusal(signed(server))
    (line,) = [line for line in message.splitlines() if reason in line and "retrying" not in line]
    assert file in line


@pytest.mark.parametrize("file", ["dataset.json", "train.index.npy", "val.checksums.npy", TAR])
def test_a_missing_file_is_named_without_credentials(server, refusal, file):
    del server.files[f"/shards/{file}"]
    message = refusal(signed(server))
    (line,) = [line for line in message.splitlines() if file in line]
    assert "missing" in line or "does not exist" in line


def test_storage_that_cannot_be_reached_is_reported_in_one_line(refusal):
    url = f"http://me:pass@127.0.0.1:{free_port()}/shards?sig=abcdef"
    *_, line = refusal(url).splitlines()
    assert "/shards/dataset.json?sig=***: connection refused" in line


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gopher://me:pass@host/shards", "Protocol not known: gopher"),
        ("abfs://me:pass@host/shards?sig=abcdef", "adlfs"),  # the package that is not installed
    ],
)
def test_urls_that_cannot_be_read_are_refused_in_one_line(refusal, url, reason):
    (line,) = refusal(url).splitlines()
    assert f"{url.partition(':')[0]}://host/shards/dataset.json" in line
    assert reason in line


@pytest.mark.slow
@pytest.mark.usefixtures("_s3_server")
def test_a_missing_bucket_is_reported_in_one_line(refusal):
    (line,) = refusal("s3://no-such-bucket/shards").splitlines()
    assert "no dataset at s3://no-such-bucket/shards" in line


@pytest.mark.slow
@pytest.mark.usefixtures("_s3_server")
def test_credentials_that_are_missing_are_reported_in_one_line(refusal, monkeypatch, tmp_path):
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    *_, line = refusal("s3://bucket/shards").splitlines()
    S3FileSystem.clear_instance_cache()
    assert "s3://bucket/shards" in line


# Inspecting


def test_a_dataset_behind_a_url_is_inspected_like_a_local_one(memory, server, packed, tmp_path, call):
    reports = []
    for number, data in enumerate((packed, memory, signed(server))):
        done = call(inspect_shards.main, "--data", data, "--out", tmp_path / str(number))
        assert done.returncode == 0, done.stderr
        report = contents(tmp_path / str(number))
        report["report.md"] = report["report.md"].partition(b"\n")[2]  # the first line has the folder's name
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]
    assert (tmp_path / "2" / "report.md").read_text().startswith("# shards: 80 images in 10 classes\n")


def test_a_damaged_sample_behind_a_url_is_named(server, call, tmp_path):
    tar = bytearray(server.files[f"/shards/{TAR}"])
    offset = tar.index(b"\xff\xd8")
    tar[offset + 300] ^= 1
    server.files[f"/shards/{TAR}"] = bytes(tar)
    done = call(inspect_shards.main, "--data", signed(server), "--out", tmp_path / "report")
    (line,) = done.stderr.splitlines()
    assert f"/shards/{TAR}?X-Amz-Signature=***&id=1 at byte {offset} does not match its checksum" in line


# Packing


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://me:pass@127.0.0.1:1/shards?sig=abcdef", "is on a web server, which stores nothing"),
        ("abfs://me:pass@host/shards?sig=abcdef", "adlfs"),
        ("gopher://me:pass@host/shards", "Protocol not known: gopher"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_in_one_line(pictures, call, url, reason):
    done = call(make_shards.main, "--input", pictures, "--out", url)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert reason in line
    assert not any(secret in done.stdout + line for secret in SECRETS)


@pytest.mark.slow
@pytest.mark.usefixtures("_s3_server")
def test_a_missing_bucket_for_the_output_is_reported_in_one_line(pictures, call):
    done = call(
        make_shards.main, "--input", pictures, "--out", "s3://no-such-bucket/shards", "--workers", "1"
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("make-shards: s3://no-such-bucket/shards: ")
    assert "bucket does not exist" in line


def test_credentials_in_the_input_are_not_in_the_plan(tmp_path):
    options = PackingOptions("https://me:pass@host/a?sig=abcdef", str(tmp_path))
    assert describe_plan(options, [])["--input"] == "https://host/a?sig=***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a@b?versionId=1", "s3://bucket/a@b?versionId=1"),
        ("https://me:p@ss@host/a?X-Amz-Credential=abc&n=1", "https://host/a?X-Amz-Credential=***&n=1"),
        ("https:///me:pass@host/a", "https:///host/a"),
        ("a of https://me:pass@host/?sig=abc failed", "a of https://host/?sig=*** failed"),
        ("/local/a:b@c?token=1", "/local/a:b@c?token=1"),
    ],
)
def test_urls_are_shown_without_credentials(text, shown):
    assert redact(text) == shown
