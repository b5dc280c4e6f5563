"""The wheel: what it contains, under which names, and that it works where nothing else of the project is."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
from packaging.requirements import Requirement

import setup
from pipeline import __version__
from tests.helpers import REPO, TINY, project_copy

SUFFIXES = (".css", ".html", ".py", ".toml", ".typed")  # of what a wheel has
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def build(folder: Path, **environment: str) -> Path:
    """Build a wheel as pip does, but with the setuptools of this environment."""
    source = project_copy(folder / "checkout")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def installed(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack a wheel; return an environment in which it can be imported, and the checkout cannot."""
    for name in setup.FOLDERS:
        (folder / "refused").mkdir(exist_ok=True)
        (folder / "refused" / f"{name}.py").write_text(f"raise ImportError('{name} of the checkout')\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return os.environ | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{folder / 'refused'}"}


@pytest.fixture
def python(wheel, tmp_path):
    """python(*arguments): run Python with the wheel, and without the checkout; return output and errors."""
    environment = installed(wheel, tmp_path)

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=PIPE, stderr=STDOUT, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"alexnet_train-{__version__}.dist-info/{name}").decode()


@pytest.mark.slow
def test_every_file_of_the_wheel_is_in_its_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folders = {Path(name).parts[0] for name in archive.namelist()}
    assert folders == {"alexnet_train", f"alexnet_train-{__version__}.dist-info"}
    recorded = {line.split("/")[0] for line in metadata(wheel, "RECORD").splitlines()}
    assert recorded == folders
    assert metadata(wheel, "top_level.txt").split() == ["alexnet_train"]


@pytest.mark.slow
def test_the_wheel_has_every_module_and_data_file(wheel):
    expected = set()
    for folder in setup.FOLDERS:
        for path in (REPO / folder).rglob("*"):
            if path.suffix in SUFFIXES:
                inside = path.relative_to(REPO)
                inside = Path(inside.name) if inside.parent == Path("tools/package") else inside
                expected.add(f"alexnet_train/{inside}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("alexnet_train/")}
    libraries = {f"alexnet_train/{name}.abi3.so" for name in ("model/_cpu_pool", "pipeline/_cpu_crop")}
    assert names - expected == libraries
    assert expected <= names


@pytest.mark.slow
def test_the_wheels_metadata_have_the_version_and_ranges(wheel):
    message = message_from_string(metadata(wheel, "METADATA"))
    assert message["Version"] == __version__
    requirements = [Requirement(text) for text in message.get_all("Requires-Dist", [])]
    used = [each for each in requirements if "extra" not in str(each.marker or "")]
    assert {each.name for each in used} >= {"torch", "numpy", "pillow"}
    for each in used:
        assert {part.operator for part in each.specifier} <= {"~=", ">="}, f"{each} is not a range"


@pytest.mark.slow
def test_a_run_with_two_processes_of_the_wheel(python, packed, tmp_path):
    """It starts other processes by their modules' names, reads a recipe, and uses the C kernel."""
    run = ["--data", str(packed), "--out", "run", "--port", "0", "--processes", "2", *TINY, "--epochs", "1"]
    output = python("-m", "alexnet_train", *run)
    assert "step 5/5" in output
    assert "slower" not in output  # as it would be without the kernel
    assert f'"alexnet-train": "{__version__}"' in (tmp_path / "run/environment.json").read_text()


@pytest.mark.slow
def test_the_commands_of_the_wheel(python, pictures, tmp_path):
    assert python("-c", entry_point("alexnet-train"), "--version") == f"alexnet-train {__version__}\n"
    pack = ["--input", str(pictures), "--out", "shards", "--size", "80", "--workers", "2"]
    python("-c", entry_point("make-shards"), *pack)
    assert f'"by": "alexnet-train {__version__}"' in (tmp_path / "shards/dataset.json").read_text()
    doctor = json.loads(python("-m", "alexnet_train.tools.diagnosing.hardware", "cpu"))
    assert doctor["kernels"] is True


def entry_point(script: str) -> str:
    """Return the code that pip puts into the script."""
    target = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"][script]
    module, function = setup.moved(target).split(":")
    return f"from {module} import {function}; {function}()"


@pytest.mark.slow
def test_the_scripts_of_the_wheel_start_what_pyproject_names(wheel):
    lines = metadata(wheel, "entry_points.txt").splitlines()
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert [line for line in lines if "=" in line] == [
        f"{name} = {setup.moved(target)}" for name, target in scripts.items()
    ]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_has_no_kernel_and_works(tmp_path):
    wheel = build(tmp_path, CC="false")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    code = "import torch; from alexnet_train.model.fused import normalise_and_pool as f; "
    code += "print(f(torch.ones(1, 16, 13, 13), 1e-4).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=installed(wheel, tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "torch.Size([1, 16, 6, 6])\n"
    assert "no compiled CPU kernel, so the net will be slower: it was not built" in done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from model import lrn", "from alexnet_train.model import lrn"),
        (
            "from pipeline.packing.pack import (\n    a,\n)",
            "from alexnet_train.pipeline.packing.pack import (\n    a,\n)",
        ),
        (
            "def f():\n    from tools.paper import main",
            "def f():\n    from alexnet_train.tools.paper import main",
        ),
        ("from models import a", "from models import a"),
        ("from torch.trainer import a", "from torch.trainer import a"),
        ("from alexnet_train.model import lrn", "from alexnet_train.model import lrn"),
        ("x = 'trainer.cli'", "x = 'trainer.cli'"),
    ],
)
def test_imports_are_moved(before, after):
    assert setup.with_moved_imports(before) == after


@pytest.mark.parametrize("source", ["import trainer", "import os, model.lrn", "x = 1; from tools import a"])
def test_an_import_that_cannot_be_moved_is_refused(source):
    with pytest.raises(ValueError, match=r"line 1: write `from (trainer|model\.lrn|tools) import …`"):
        setup.with_moved_imports(source)


def test_no_module_names_another_in_a_string():
    """Strings are not moved, so a wheel would not find such a module."""
    names = re.compile(rf"(?<!removesuffix\()[\"']((?:{'|'.join(setup.FOLDERS)})(?:\.\w+)+)[\"']")
    for folder in setup.FOLDERS:
        for path in (REPO / folder).rglob("*.py"):
            if path == REPO / "tools/command.py":  # which adds the prefix
                continue
            for name in names.findall(path.read_text()):
                module = REPO / name.replace(".", "/")
                kernel = module.with_name(module.name.lstrip("_")).with_suffix(".c")  # of a compiled module
                exists = module.is_dir() or module.with_suffix(".py").exists() or kernel.exists()
                assert not exists, f"{path} names {name}"


def test_no_document_starts_a_module_that_a_wheel_lacks():
    folders = "|".join(setup.FOLDERS)
    for path in [REPO / "README.md", *(REPO / "docs").glob("*.md"), *(REPO / "docker").rglob("*.y*ml")]:
        found = re.findall(rf"-m (?:{folders})\.\S+", path.read_text())
        assert set(found) <= {"-m tools.benchmarks.traffic"}, f"{path}: use -m alexnet_train"
