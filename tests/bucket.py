"""A bucket for tests: an HTTP server that sends ranges, injects faults, and counts what it sends."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread


class Bucket(ThreadingHTTPServer):
    """Serves `files` by name.

    fault: called with each request's handler, name and range; returns whether it has answered. sent: number
    of bytes by name. requests: number of requests by name.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.files = {
            str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        self.fault: Callable[[Handler, str, range], bool] = lambda handler, name, part: False
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.lock = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/data"

    def handle_error(self, *_: object) -> None:
        """Clients that are killed are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        content = self.server.files.get(name)
        if content is None:
            self.refuse(404)
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = range(int(first), min(int(last) + 1 if last else len(content), len(content)))
        with self.server.lock:
            self.server.requests[name] += 1
        if not self.server.fault(self, name, part):
            self.send(content[part.start : part.stop], name)

    def do_HEAD(self) -> None:
        self.refuse(404)

    def send(self, content: bytes, name: str = "", length: int | None = None) -> None:
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        with self.server.lock:
            self.server.sent[name] += len(content)
        self.wfile.write(content)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Bucket]:
    with Bucket(root) as bucket:
        Thread(target=bucket.serve_forever, args=(0.05,), daemon=True).start()
        yield bucket
        bucket.shutdown()
