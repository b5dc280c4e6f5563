"""The CPU kernel that crops and normalises, compared with DALI's operators and with Pillow."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.loader
from pipeline import Dataset, DatasetError, Loader, cpu_crop
from pipeline.cpu_crop import Cropper
from tests.helpers import assert_same_batches, copies
from tests.trees import pack_here

SIDE = 48
MEAN, DIVISOR = np.array([120.5, 99.25, 80.0], np.float32), np.array([1.1, 58.0, 1.0], np.float32)
# (height, width): smaller, equal and larger sides, one pixel, extreme shapes, and twice and thrice the side.
SHAPES = [(48, 48), (48, 30), (33, 48), (1, 1), (1, 90), (200, 2), (96, 144), (251, 77), (47, 49), (600, 601)]


def pictures(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def resized(images: list[np.ndarray], threads: int = 1) -> torch.Tensor:
    """Resize images with the kernel; every second one is mirrored."""
    count = len(images)
    mirror = np.arange(count, dtype=np.int32) % 2
    means, divisors = np.tile(MEAN, (count, 1)), np.tile(DIVISOR, (count, 1))
    return Cropper(SIDE, threads)(images, means, divisors, mirror)


def test_images_are_resized_as_pillow_resizes_them():
    """Pillow rounds after each of the two passes, which may make a level."""
    images = pictures(*SHAPES)
    for number, (image, pixels) in enumerate(zip(images, resized(images), strict=True)):
        expected = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        expected = expected[:, :: -1 if number % 2 else 1].astype(np.float64)
        levels = pixels.permute(1, 2, 0).double().numpy() * DIVISOR + MEAN
        np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
        assert abs(levels - expected).max() < 1.001
        assert abs(levels - expected).mean() < 0.3


def test_the_shapes_and_the_memory_format_are_those_of_a_batch():
    pixels = resized(pictures(*SHAPES))
    assert pixels.shape == (len(SHAPES), 3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module", params=["256", "short256", "original"])
def dataset(request: pytest.FixtureRequest, oblong, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    output = tmp_path_factory.mktemp("shards")
    pack_here("--input", oblong, "--out", output, "--geometry", request.param, "--size", "100")
    return Dataset(output)


def both(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, **options):
    """Return the same batches from the kernel and from DALI's operators."""
    options = {"batch": 12, "device": "cpu", "std": dataset.std, **options}
    with Loader(dataset, **options) as loader:
        ours = copies(loader.batches(0, 10))
    monkeypatch.setattr(pipeline.loader, "_find_cropper", lambda _: None)
    with Loader(dataset, **options) as loader:
        return ours, copies(loader.batches(0, 10))


@pytest.mark.parametrize("crop", [1, 63, 64, 100])
@pytest.mark.parametrize("crops_and_flips", [True, False])
def test_crops_are_those_of_dali_bit_for_bit(dataset, monkeypatch, crop, crops_and_flips):
    options = {"crop": crop, "crops_and_flips": crops_and_flips, "colour": "code2012"}
    assert_same_batches(*both(dataset, monkeypatch, **options))


def test_enlarged_crops_are_those_of_dali_up_to_a_rare_level(dataset, monkeypatch):
    ours, dalis = both(dataset, monkeypatch, crop=160, scale=(0.08, 1.0), colour="paper")
    std = torch.tensor(dataset.std)[:, None, None]
    for (pixels, labels), (expected, expected_labels) in zip(ours, dalis, strict=True):
        assert torch.equal(labels, expected_labels)
        levels = ((pixels - expected) * std).abs()
        assert levels.max() < 1.001
        assert (levels > 0.001).double().mean() < 0.001


@pytest.mark.parametrize("threads", [2, 3, 50])
def test_the_result_is_bitwise_the_same_with_any_number_of_threads(threads):
    images = pictures(*SHAPES)
    assert torch.equal(resized(images, threads), resized(images))


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is there code for several processors")
def test_the_result_is_bitwise_the_same_on_every_processor(tmp_path, monkeypatch):
    images, library = pictures(*SHAPES), tmp_path / "library.so"
    expected = resized(images)
    source = cpu_crop.__file__.removesuffix(".py") + ".c"
    flags = ["-O1", "-ffp-contract=off", "-U__gnu_linux__", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, source, "-lm"], check=True)
    monkeypatch.setattr(cpu_crop, "_LIBRARY", cpu_crop.open_library(str(library)))
    assert torch.equal(resized(images), expected)


AT_THE_END_OF_MEMORY = """
import ctypes, mmap
import numpy as np
from pipeline.cpu_crop import Cropper

pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
for height, width in ((7, 5), (12, 12), (1, 1), (20, 30)):
    size = height * width * 3
    image = np.frombuffer(pages, np.uint8, size, mmap.PAGESIZE - size).reshape(height, width, 3)
    ones = np.ones((1, 3), np.float32)
    print(Cropper(12, 1)([image], ones, ones, np.zeros(1, np.int32)).shape)
"""


def test_no_byte_beyond_an_image_is_read():
    """The page after the image cannot be read: reading it kills the process."""
    command = [sys.executable, "-c", AT_THE_END_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("[1, 3, 12, 12]") == 4


def test_memory_is_used_again_only_when_nothing_refers_to_the_batch():
    cropper, images = Cropper(SIDE, 1), pictures((60, 60))
    given = MEAN[None], DIVISOR[None], np.zeros(1, np.int32)
    first, second = cropper(images, *given), cropper(images, *given)
    assert first.data_ptr() != second.data_ptr()
    address, part = first.data_ptr(), first[:, :, 3:]
    del first
    assert cropper(images, *given).data_ptr() != address
    del part
    assert cropper(images, *given).data_ptr() == address


def test_an_image_smaller_than_its_crop_is_refused():
    arguments = MEAN[None], DIVISOR[None], np.zeros(1, np.int32), np.zeros(1), np.zeros(1)
    with pytest.raises(DatasetError, match="smaller than the crop of 48 px"):
        Cropper(SIDE, 1)(pictures((60, 47)), *arguments)


def test_without_the_kernel_batches_are_the_same_and_a_warning_is_given(dataset, monkeypatch):
    options = {"batch": 12, "crop": 64, "device": "cpu"}
    with Loader(dataset, **options) as loader:
        expected = copies(loader.batches(0, 3))
    monkeypatch.delitem(sys.modules, "pipeline.cpu_crop")
    monkeypatch.delattr(pipeline, "cpu_crop")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        Loader(dataset, **options) as loader,
        pytest.warns(
            UserWarning, match="no compiled CPU kernel, so images load more slowly: it was not built"
        ),
    ):
        assert_same_batches(copies(loader.batches(0, 3)), expected)
