"""A table of URLs: which errors are retried, which files are rejected and why, and what ends the run."""

import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import retry, storage
from pipeline.manifest import DatasetError, Manifest
from pipeline.packing import contents
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.remote_errors import redact
from pipeline.retry import StorageError
from tests.pipeline.packing import faulty_server
from tests.pipeline.packing.faulty_server import Fault, FaultyServer, once, redirect, serving, status
from tests.trees import pack_here
from tools.make_shards import check_rejects

REJECTED: dict[str, tuple[Fault, str]] = {
    **{f"status {code}": (status(code), f"HTTP {code}") for code in (400, 401, 403, 404, 410, 451)},
    **{f"status {code}": (status(code), f"HTTP {code}") for code in (429, 500, 502, 503, 504)},
    "wait": (status(503, Retry_After="0"), "HTTP 503"),
    "wait for a date": (status(429, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"), "HTTP 429"),
    "wait for nonsense": (status(429, Retry_After="soon"), "HTTP 429"),
    "loop": (redirect(), "redirect loop"),
    "to a file": (redirect("file:///etc/passwd"), "unsupported URL"),
    "to nowhere": (redirect("http://nowhere.invalid/"), "host not found"),
    "to a closed port": (redirect("http://127.0.0.1:1/"), "connection refused"),
    "cut": (faulty_server.cut, "broken off"),
    "reset": (faulty_server.reset, "broken off"),
    "silent": (faulty_server.silent, "timed out"),
    "stall": (faulty_server.stall, "timed out"),
    "trickle": (faulty_server.trickle, "timed out"),
}


def announces_much(handler) -> None:
    handler.send(b"abc", storage.MAX_BYTES + 1)


REJECTED["large"] = (announces_much, "too large")
TRANSIENT = {
    "503": status(503),
    "429": status(429, Retry_After="1"),
    "cut": faulty_server.cut,
    "reset": faulty_server.reset,
    "stall": faulty_server.stall,
}
ELSEWHERE = {
    "http://nowhere.invalid/a.jpg": "host not found",
    "http://127.0.0.1:1/a.jpg": "connection refused",
    "gopher://host/a.jpg": "unsupported URL",
    "http://[broken/a.jpg": "unsupported URL",
    "http:///a.jpg": "unsupported URL",
}


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Retry soon, and give up soon where a server is silent."""
    monkeypatch.setattr(retry, "PAUSES", (0.02,) * 4)
    if any(fault in request.node.name for fault in ("silent", "stall", "trickle")):
        monkeypatch.setattr(storage, "_HTTP_SECONDS", {"sock_connect": 1, "sock_read": 0.4, "total": 1})


@pytest.fixture
def server(pictures) -> Iterator[FaultyServer]:
    """Eight pictures of two classes, of which two are for validation."""
    with serving() as server:
        for split, count in (("train", 3), ("val", 1)):
            for folder in sorted((pictures / split).iterdir())[:2]:
                for picture in sorted(folder.iterdir())[:count]:
                    server.files[f"/{split}/{folder.name}/{picture.name}"] = picture.read_bytes()
        yield server


@pytest.fixture
def pack(server, tmp_path) -> Callable[..., Manifest]:
    """Pack the table of the server's files, and of other ones of the first class."""

    def run(*others: str) -> Manifest:
        rows = [(server.url + path, *path.split("/")[1:3][::-1]) for path in server.files]
        rows += [(url, rows[0][1], "train") for url in others]
        with (tmp_path / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])
        return pack_here("--input", tmp_path / "table.csv", "--out", tmp_path / "out", "--size", 32)

    return run


def report(tmp_path: Path) -> list[tuple[str, ...]]:
    lines = (tmp_path / "out/report.tsv").read_text().splitlines()[1:]
    return [tuple(line.split("\t")) for line in lines]


def images(manifest: Manifest) -> int:
    return sum(split.samples for split in manifest.splits.values())


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_that_cannot_be_fetched_is_rejected_by_name_and_reason(name, server, pack, tmp_path):
    fault, reason = REJECTED[name]
    path = next(iter(server.files))
    server.faults[path] = fault
    manifest = pack()
    assert report(tmp_path) == [(server.url + path, "rejected", reason)]
    assert images(manifest) == 7
    with pytest.raises(DatasetError, match="1 of 8 files were rejected"):
        check_rejects(manifest, 0.01)


def test_each_file_of_a_list_may_be_the_bad_one(server, pack, tmp_path):
    for path in list(server.files):
        server.faults = {path: status(503)}
        assert images(pack()) == 7
        assert report(tmp_path) == [(server.url + path, "rejected", "HTTP 503")]
        for file in (tmp_path / "out").iterdir():
            file.unlink()


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_transient_error_is_retried(name, server, pack, tmp_path):
    path = next(iter(server.files))
    server.faults[path] = once(TRANSIENT[name])
    start = time.monotonic()
    assert images(pack()) == 8
    assert report(tmp_path) == []
    assert server.requests[path] == 2
    assert name != "429" or time.monotonic() - start >= 1  # as the server asks


def test_a_permanent_error_is_not_retried(server, pack):
    path = next(iter(server.files))
    server.faults[path] = status(403)
    pack()
    assert server.requests[path] == 1


@pytest.mark.parametrize("url", ELSEWHERE)
def test_the_few_files_of_an_unavailable_host_are_rejected(url, pack, tmp_path):
    assert images(pack(url)) == 8
    assert report(tmp_path) == [(url, "rejected", ELSEWHERE[url])]


def test_a_file_of_a_server_without_tls_is_rejected(server, pack, tmp_path):
    url = f"{server.url.replace('http', 'https')}/a.jpg"
    assert images(pack(url)) == 8
    assert report(tmp_path) == [(url, "rejected", "TLS error")]


def test_an_unavailable_host_with_many_files_ends_the_run(pack, tmp_path):
    urls = [f"http://127.0.0.1:1/{number}.jpg" for number in range(contents._MANY)]
    with pytest.raises(StorageError, match=r"^http://127.0.0.1:1/\d+.jpg: connection refused, and no other"):
        pack(*urls)
    assert not (tmp_path / "out/dataset.json").exists()


def test_any_number_of_files_of_hosts_that_are_not_found_is_rejected(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_HTTP_SECONDS", {"total": 60})  # looking many names up at once takes time
    urls = [f"http://nowhere.invalid/{number}.jpg" for number in range(contents._MANY + 2)]
    assert images(pack(*urls)) == 8
    assert {row[1:] for row in report(tmp_path)} == {("rejected", "host not found")}
    assert len(report(tmp_path)) == len(urls)


@pytest.mark.parametrize(
    "fault", [status(503), faulty_server.silent, faulty_server.reset], ids=["503", "silent", "reset"]
)
def test_an_unavailable_server_ends_the_run_and_the_same_command_continues(fault, server, pack, tmp_path):
    server.faults = dict.fromkeys(server.files, fault)
    with pytest.raises(StorageError, match=f"^{server.url}/.*and no other file of 127.0.0.1"):
        pack()
    assert not (tmp_path / "out/dataset.json").exists()
    server.faults.clear()
    assert images(pack()) == 8
    assert report(tmp_path) == []


def test_a_server_that_becomes_unavailable_ends_the_run(server, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "READ_AHEAD", 1)

    def after_three(handler) -> object:
        return sum(server.requests.values()) <= 3 or handler.refuse(503)

    server.faults = dict.fromkeys(server.files, after_three)
    with pytest.raises(StorageError, match="HTTP 503"):
        pack()
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_proxy_of_the_environment_is_used(server, pack, tmp_path, monkeypatch):
    """It is asked for whole URLs, and only for those that NO_PROXY leaves to it."""
    url = "http://pictures.invalid/a.jpg"
    content = next(iter(server.files.values()))
    with serving() as proxy:
        proxy.files[url] = content
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        assert images(pack(url)) == 9
    assert proxy.requests == {url: 1}
    assert report(tmp_path) == []


def test_the_report_redacts_the_secrets_of_urls(server, pack, tmp_path):
    path = next(iter(server.files))
    host = server.url.removeprefix("http://")
    server.faults["/secret.jpg"] = status(403)
    assert images(pack(f"http://me:pass@{host}/secret.jpg?X-Amz-Signature=abc&id=1")) == 8
    assert server.requests["/secret.jpg?X-Amz-Signature=abc&id=1"] == 1
    assert report(tmp_path) == [(f"{server.url}/secret.jpg?X-Amz-Signature=***&id=1", "rejected", "HTTP 403")]
    assert redact(f"{os.sep}local{path}?token=a") == f"{os.sep}local{path}?token=a"


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "folder"])
@pytest.mark.parametrize("code", [403, 404, 503])
def test_the_refusal_of_an_input_redacts_its_password(name, code, server):
    server.faults = {path: status(code) for path in (f"/{name}", "/folder/", "/")}
    url = server.url.replace("http://", "http://me:pass@")
    with pytest.raises(SourceError, match=f"--input {server.url}/{name}") as refusal:
        find_sources(f"{url}/{name}", None, 0)
    assert "pass@" not in str(refusal.value)
