"""Commands as people run them and in this process, and a server of S3's protocol."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import REPO
from tools import verify_shards


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[None]:
    from moto.server import ThreadedMotoServer  # which takes seconds, and only slow tests need it
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def s3(_s3_server: None, request: pytest.FixtureRequest) -> str:
    """The URL of a module's own bucket, on a server of S3's protocol on this machine."""
    from s3fs import S3FileSystem

    bucket = request.module.__name__.rpartition(".")[2].replace("_", "-")
    S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., subprocess.CompletedProcess]:
    """make_shards(input, output, *arguments, **environment): as a process, with one worker unless told.

    It has a process group of its own, so that what is to happen to all of it spares the tests.
    """

    def run(source: Path, output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(output)]
        return subprocess.run(
            [*command, "--workers", "1", *arguments],
            cwd=REPO,
            env=os.environ | environment,
            start_new_session=True,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess]:
    """call(main, *arguments): run a command in this process; returns what a process of it would leave."""

    def run(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess:
        command = [f"{main.__module__.rpartition('.')[2]}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()  # what was printed before is not the command's
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        return subprocess.CompletedProcess(
            command, 1 if isinstance(code, str) else int(code or 0), *capsys.readouterr()
        )

    return run


@pytest.fixture
def _one_process_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier's checks run in this process; the command, where a test starts it, has real workers."""

    @contextmanager
    def here(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(map=map)

    monkeypatch.setattr(verify_shards, "pool", here)
