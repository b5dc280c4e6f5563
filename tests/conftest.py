"""Datasets that tests of several modules share, each made once a session."""

import os

# Before torch is imported, here and in the processes that tests start: nets as small as theirs gain nothing
# by several threads, which wait for each other for long where other jobs run beside the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

import pipeline.reader
from tools.draw_pictures import class_names, draw
from tools.make_shards import pack, parse_arguments

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or a command would start a process for each GPU
# Other jobs run beside the tests, and what is green on one machine is tried with the same examples on all.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("shared machine")

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared/data/photos"
OBLONG = (144, 120), (120, 138), (132, 120), (120, 126), (143, 110), (110, 132), (121, 110), (125, 140)
OBLONG += (90, 126), (117, 90)  # width and height in pixels


@pytest.fixture(scope="session")
def photos() -> Path:
    """A few thousand real photos of 16 classes, train and val, which are not part of the repository."""
    if not PHOTOS.is_dir():
        pytest.skip(f"no real photos at {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures, 144 px square: ten classes, of each 6 to train on and 2 to validate on."""
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
    """Upright and broad pictures, one of each class to train on and one to validate on.

    Resized to a shorter side of 100 px, their longer one comes to a whole number of pixels too.
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
    """The drawn pictures packed: 80 px square, 60 of train in three shards and 20 of val in one."""
    output = tmp_path_factory.mktemp("packed")
    sizes = ["--size", "80", "--shard-samples", "25", "--workers", "1"]
    pack(parse_arguments(["--input", str(pictures), "--output", str(output), *sizes]))
    return output


@pytest.fixture
def _larger_than_memory(monkeypatch):
    """Datasets are too large to be kept: each sample is read each time."""
    monkeypatch.setattr(pipeline.reader, "memory_bytes", lambda: 0)
