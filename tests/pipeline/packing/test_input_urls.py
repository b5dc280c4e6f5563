"""Tables and archives behind URLs: outages while they are read are retried, and otherwise named."""

import io
import random
import tarfile
from collections.abc import Callable, Iterator
from itertools import count

import pyarrow
import pytest
from pyarrow import parquet

from pipeline import retry, storage
from pipeline.packing.sources.compressed import CompressedFile
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.retry import StorageError
from pipeline.storage import open_file
from tests.pipeline.packing import faulty_server
from tests.pipeline.packing.faulty_server import FaultyServer, Handler, serving, status

CONTENT = random.Random(0).randbytes(3_000_000)
COLUMNS = {"path": ["1.jpg", "2.jpg"], "label": ["a", "a"], "split": ["train", "val"]}
TABLE = "path,label,split\n1.jpg,a,train\n2.jpg,a,val\n"


class RangeHandler(Handler):
    """Sends the parts of files that it is asked for."""

    def do_HEAD(self) -> None:  # noqa: N802 – the name that http.server calls
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.files[self.path])))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def send(self, _: bytes, length: int | None = None) -> None:
        """Send the part; if `length` is given, which faults do, only half of it."""
        content = self.server.files[self.path]
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = range(len(content))[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {part.start}-{part.stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        sent = len(part) if length is None else len(part) // 2
        self.wfile.write(content[part.start : part.start + sent])


class StreamHandler(Handler):
    """Sends files as a whole, and does not say how long they are."""

    protocol_version = "HTTP/1.0"

    def send(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)
        if length is not None:
            faulty_server.disconnect(self)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(storage, "_BUFFER_BYTES", 100_000)


@pytest.fixture(params=[RangeHandler, Handler], ids=["in parts", "as a whole"])
def server(request) -> Iterator[FaultyServer]:
    with serving(request.param) as server:
        yield server


def every_other(fault: Callable[[Handler], object]) -> Callable[[Handler], object]:
    """Let every other request fail, the first among them."""
    requests = count()
    return lambda handler: True if next(requests) % 2 else fault(handler)


def at_requests(numbers: set[int], fault: Callable[[Handler], object]) -> Callable[[Handler], object]:
    """Let the requests of these numbers fail, counted from 1."""
    requests = count(1)
    return lambda handler: fault(handler) if next(requests) in numbers else True


def compressed(files: dict[str, bytes]) -> bytes:
    with io.BytesIO() as stored:
        with tarfile.open(fileobj=stored, mode="w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return stored.getvalue()


def table_as_parquet() -> bytes:
    with io.BytesIO() as stored:
        parquet.write_table(pyarrow.table(COLUMNS), stored)
        return stored.getvalue()


@pytest.mark.parametrize(
    "fault", [status(503), faulty_server.reset, faulty_server.cut], ids=["503", "reset", "cut"]
)
def test_a_file_is_read_on_after_each_passing_error(fault):
    with serving(RangeHandler) as server:
        server.files["/a"], server.faults["/a"] = CONTENT, every_other(fault)
        with open_file(f"{server.url}/a") as file:
            assert file.seek(-1000, io.SEEK_END) == len(CONTENT) - 1000
            assert file.read() == CONTENT[-1000:]
            file.seek(0)
            assert file.read(10) == CONTENT[:10]
            assert file.read() == CONTENT[10:]


def test_a_file_whose_length_is_unknown_is_read_from_the_front_after_each_passing_error():
    with serving(StreamHandler) as server:
        server.files["/a"], server.faults["/a"] = CONTENT, every_other(faulty_server.cut)
        with open_file(f"{server.url}/a") as file:
            assert file.read(10) == CONTENT[:10]
            assert file.seek(0) == 0  # it is in the buffer
            assert file.read() == CONTENT
            with pytest.raises(StorageError, match="does not support reading parts of files"):
                file.seek(5)


def test_tables_and_archives_survive_a_server_that_is_briefly_unavailable(server):
    server.files |= {
        "/t.csv": TABLE.encode(),
        "/t.parquet": table_as_parquet(),
        "/t.tgz": compressed({"a": b"b"}),
    }
    server.faults = {path: at_requests({1, 3}, status(503)) for path in server.files}
    names = ("t.csv", "t.parquet") if server.RequestHandlerClass is RangeHandler else ("t.csv",)
    for name in names:
        sources = find_sources(f"{server.url}/{name}", None, 0)
        assert (sources.classes, list(sources.splits)) == (["a"], ["train", "val"])
    with CompressedFile(f"{server.url}/t.tgz") as file:
        assert b"".join(file.chunks())[512:513] == b"b"


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_of_a_server_that_stays_unavailable_is_not_called_damaged(name, server):
    server.files[f"/{name}"] = b"" if name == "t.csv" else table_as_parquet()
    server.faults[f"/{name}"] = status(503)
    with pytest.raises(SourceError, match=rf"cannot be read: .*/{name}: HTTP 503$"):
        find_sources(f"{server.url}/{name}", None, 0)


def test_an_archive_that_is_cut_in_the_middle_is_not_called_damaged():
    with serving(RangeHandler) as server:
        server.files["/t.tgz"] = compressed(
            {"a": random.Random(1).randbytes(12_000_000)}
        )  # fsspec reads 5 MiB ahead
        with CompressedFile(f"{server.url}/t.tgz") as file:
            assert len(file("a", 0, 512)) == 512
            server.faults["/t.tgz"] = faulty_server.reset
            with pytest.raises(StorageError, match=r"t\.tgz: broken off"):
                list(file.chunks())
