"""The packing command, run as people run it, and one dataset as folders and as ILSVRC's tars."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

REPO = Path(__file__).resolve().parents[2]

Tree = dict[str, dict[str, dict[str, bytes]]]  # split, class, file, content


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def val_files(tree: Tree) -> dict[str, tuple[str, bytes]]:
    """Class and content by name, sorted: in val, names do not repeat."""
    pairs = (
        (name, (wnid, content)) for wnid, files in tree["val"].items() for name, content in files.items()
    )
    return dict(sorted(pairs))


def class_folders(tree: Tree, root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for wnid, files in tree[split].items():
            for name, content in files.items():
                write(root / split / wnid / name, content)
    return root


def tars(tree: Tree, root: Path) -> Path:
    """As downloaded, with the ground truth by numbers. Neither the classes nor the files are in order."""
    numbers = {wnid: number for number, wnid in enumerate(reversed(tree["train"]), 1)}
    inside = {f"{wnid}.tar": tar_of(tree["train"][wnid]) for wnid in numbers}
    flat = val_files(tree)
    write(root / "ILSVRC2012_img_train.tar", tar_of(inside))
    write(root / "ILSVRC2012_img_val.tar", tar_of({name: flat[name][1] for name in reversed(flat)}))
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in flat.values())
    write(root / "ILSVRC2012_validation_ground_truth.txt", truth)
    write(root / "map_clsloc.txt", "".join(f"{wnid} {number} words\n" for wnid, number in numbers.items()))
    return root


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[None]:
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
    bucket = request.module.__name__.rpartition(".")[2].replace("_", "-")
    S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., subprocess.CompletedProcess]:
    """make_shards(input, output, *arguments, **environment), with one worker unless told."""

    def run(source: Path, output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(output)]
        return subprocess.run(
            [*command, "--workers", "1", *arguments],
            cwd=REPO,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
