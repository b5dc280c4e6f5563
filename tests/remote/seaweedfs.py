"""SeaweedFS, an S3 server that checks signatures, on this machine for tests and endurance runs."""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.helpers import free_ports, wait_until

KEY, SECRET = "trainer", "a secret of the tests"
_SERVICES = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
_SERVICES += ("filer.port.grpc", "s3.port", "s3.port.grpc")
_OFF = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false")


def executable() -> str | None:
    """Return the path of SeaweedFS's program, or None if it is not installed."""
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def credentials(endpoint: str) -> dict[str, str]:
    """Return the environment in which S3 clients use this server. endpoint: its URL or that of a proxy."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Run a server on loopback, with its files and its log in a new folder; yield its URL.

    It serves KEY with its SECRET and refuses everyone else. Nothing is reported to its makers.
    """
    program = executable()
    assert program, "SeaweedFS is not installed"
    folder.mkdir(parents=True)
    identity = {
        "name": "trainer",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip(_SERVICES, free_ports(len(_SERVICES)), strict=True))
    options = [f"-{service}={port}" for service, port in ports.items()]
    options += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64"]
    options += ["-volume.max=100", "-filer", "-s3", f"-s3.config={folder / 's3.json'}", *_OFF]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([program, "server", *options], stdout=log, stderr=log, cwd=folder)
    url = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        wait_until(lambda: _answers(url), server)
        yield url
    finally:
        server.kill()  # an orderly end takes ten seconds, and its files are not needed any more
        server.wait()


def _answers(url: str) -> bool:
    """Return whether the server is ready; it refuses a request without a signature."""
    try:
        urlopen(url, timeout=5)
    except HTTPError as error:
        return error.code == 403
    except OSError:
        return False
    return False


@contextmanager
def served(folder: Path, bucket: str = "bucket") -> Iterator[str]:
    """Run a server as `seaweedfs` does, with an empty bucket, in the environment of this process.

    Yields the server's URL.
    """
    from s3fs import S3FileSystem

    before = dict(os.environ)
    with seaweedfs(folder) as url:
        os.environ.update(credentials(url))
        S3FileSystem.clear_instance_cache()
        try:
            S3FileSystem().mkdir(bucket)
            yield url
        finally:
            os.environ.clear()
            os.environ.update(before)
            S3FileSystem.clear_instance_cache()
