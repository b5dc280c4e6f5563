"""`make release`: what it builds, and what it refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import __version__
from tests.helpers import missing, project_copy

TOOLS = ("auditwheel", "check-wheel-contents", "cyclonedx-py", "patchelf", "pyproject-build", "twine")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with the files of this one, in a single commit."""
    folder = project_copy(tmp_path / "checkout")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Everything")


def release(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"VENV": str(Path(sys.executable).parents[1])} | environment
    return subprocess.run(
        [checkout / ".ci/release"], env=variables, capture_output=True, text=True, check=False
    )


def edited(path: str, before: str, after: str) -> Callable[[Path], None]:
    """Return a change of a file, which is then committed."""

    def change(checkout: Path) -> None:
        file = checkout / path
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after, 1))
        commit(checkout)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda checkout: (checkout / "model/new.py").touch(), "the working tree has changes: commit"),
        (
            edited("pipeline/__init__.py", __version__, "98.7.6"),
            "CHANGELOG.md has no section '## [98.7.6] - YYYY-MM-DD': ",
        ),
        (
            edited("CHANGELOG.md", f"## [{__version__}] - ", f"## [{__version__}] "),
            "CHANGELOG.md has no section",
        ),
        (
            edited("pipeline/__init__.py", "__version__", "VERSION"),
            "pipeline/__init__.py has no line",
        ),
        (lambda checkout: shutil.rmtree(checkout / ".git"), "fatal: not a git repository"),
    ],
    ids=["new file", "no section", "no date", "no version", "no git"],
)
def test_a_release_is_refused(change, message, checkout):
    (checkout / "dist").mkdir()
    change(checkout)
    done = release(checkout, GIT_CEILING_DIRECTORIES=str(checkout.parent))
    assert done.returncode != 0
    assert done.stderr.removeprefix("release: ").startswith(message), done.stderr
    assert not list((checkout / "dist").iterdir())


@pytest.mark.slow
def test_a_release_is_built_checked_and_not_signed_without_a_key(checkout):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for tool in TOOLS:
        if not shutil.which(tool, path=path):
            missing(tool, "make setup")
    done = release(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not signed, because SIGNING_KEY names no key" in done.stdout
    sums = dict(line.split()[::-1] for line in (checkout / "dist/SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in (checkout / "dist").iterdir() if path.name != "SHA256SUMS"}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    patterns = [r"cp311-abi3-manylinux.*\.whl", r"\.tar\.gz", r"cpu\.cdx\.json", r"cuda\.cdx\.json"]
    for pattern in patterns:
        [name] = [name for name in files if re.fullmatch(rf"alexnet_train-{__version__}-?{pattern}", name)]
        assert files.pop(name).stat().st_size
    assert not files
    assert git(checkout, "status", "--porcelain") == ""
    for target in ("cpu", "cuda"):
        check_sbom(checkout, target)


def check_sbom(checkout: Path, target: str) -> None:
    """Compare an SBOM with the lock file of its image."""
    sbom = json.loads((checkout / f"dist/alexnet_train-{__version__}-{target}.cdx.json").read_text())
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("alexnet-train", __version__)
    locks = "".join((checkout / f"docker/requirements-{name}.txt").read_text() for name in (target, "pillow"))
    listed = {(each["name"], each["version"]) for each in sbom["components"]}
    assert listed == set(re.findall(r"^([\w.-]+)==([^ ;]+)", locks, re.MULTILINE))
