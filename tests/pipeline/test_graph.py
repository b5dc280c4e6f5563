"""The DALI graphs decode, resize, crop, mirror, subtract and divide as Pillow and numpy do."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipeline.graph import (
    RESERVED_BYTES,
    Decoding,
    GraphOptions,
    augment,
    augment_resized,
    evaluation_pipeline,
    reserved_size,
    train_pipeline,
)
from pipeline.manifest import read_manifest
from pipeline.reader import ShardReader
from tests.helpers import with_nearest_chroma
from tests.trees import pack_here

GEOMETRIES = ("256", "short256", "original")
SIZE, CROP = 100, 88  # smaller than the paper's, to be quick


@pytest.fixture(scope="module")
def some_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real photos of each of 16 classes for training, and one for validation."""
    root = tmp_path_factory.mktemp("some_photos")
    for split, count in (("train", 2), ("val", 1)):
        for folder in sorted((photos / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (root / split / folder.name / file.name).symlink_to(file)
    return root


class Packed:
    """A packed dataset, and its pictures as Pillow decodes them."""

    def __init__(self, source: Path, output: Path, geometry: str, whole: bool):
        """whole: whether the longer sides are resized to a whole number of pixels."""
        self.whole = whole
        self.manifest = pack_here("--input", source, "--out", output, "--geometry", geometry, "--size", SIZE)
        self.train = ShardReader(output, self.manifest, "train")
        self.val = ShardReader(output, self.manifest, "val")
        self.options = GraphOptions(
            Decoding(crop=CROP),
            batch=len(self.train),
            resize_shorter=SIZE if geometry == "original" else None,
            max_width=self.manifest.max_width,
            max_height=self.manifest.max_height,
        )

    def shown(self, jpeg: np.ndarray) -> np.ndarray:
        """Return the picture, [h,w,3], that is cropped."""
        image = Image.open(BytesIO(jpeg.tobytes()))
        if self.manifest.geometry == "original":
            size = [int(side * SIZE / min(image.size) + 0.5) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(image).astype(np.float64)

    def assert_close(self, ours: np.ndarray, expected: np.ndarray) -> None:
        """Check that pictures with levels from 0 to 255 agree within rounding.

        Both decode with libjpeg-turbo, whose builds may round one level apart. When resizing, DALI rounds
        once and Pillow twice, which makes several levels in a few pixels beside sharp edges.
        """
        difference = abs(ours.astype(np.float64) - expected)
        if self.manifest.geometry != "original":
            assert difference.max() < 1.001
            assert difference.mean() < 0.05
        elif self.whole:
            assert difference.max() < 2.001
            assert difference.mean() < 0.5
        else:
            assert difference.max() < 16
            assert difference.mean() < 0.5


@pytest.fixture(
    scope="module",
    params=[f"{kind} {geometry}" for kind in ("oblong", "some_photos") for geometry in GEOMETRIES],
)
def packed_as(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    kind, geometry = request.param.split()
    return Packed(
        request.getfixturevalue(kind), tmp_path_factory.mktemp("shards"), geometry, kind == "oblong"
    )


def crop(image: np.ndarray, left: int, top: int, mirror: bool) -> np.ndarray:
    return image[top : top + CROP, left : left + CROP][:, :: -1 if mirror else 1]


def test_the_training_graph_crops_mirrors_and_normalises_as_told(packed_as):
    reader, rng = packed_as.train, np.random.default_rng(0)
    jpegs = [reader.jpeg(number) for number in range(len(reader))]
    shown = [packed_as.shown(jpeg) for jpeg in jpegs]
    room = np.array([image.shape[1::-1] for image in shown]) - CROP
    places = rng.integers(0, room + 1)
    places[:4] = [[0, 0], [1, 0], [0, 1], [1, 1]] * room[:4]
    mirror = rng.integers(0, 2, len(jpegs), np.int32)
    mean, offset = np.array([120.5, 110.25, 99.0]), rng.normal(0, 12, (len(jpegs), 3))
    divisor, std = np.where(rng.integers(0, 2, len(jpegs)), 1.1, 1.0), np.array([1.0, 0.5, 2.0])
    x, y = np.ascontiguousarray((places / room).T, np.float32)
    scale = (std * divisor[:, None]).astype(np.float32)
    inputs = jpegs, (mean - offset).astype(np.float32), scale, mirror, x, y

    [pixels] = train_pipeline(lambda: inputs, packed_as.options).run()
    pixels = pixels.as_array()
    assert pixels.shape == (len(jpegs), CROP, CROP, 3)
    assert pixels.dtype == np.float32
    for n, image in enumerate(shown):
        expected = (crop(image, *places[n], mirror[n]) - mean + offset[n]) / divisor[n]
        packed_as.assert_close(pixels[n] * std, expected)


@pytest.mark.parametrize("crops", [1, 10])
def test_the_evaluation_graph_takes_the_central_crop_or_ten(packed_as, crops):
    reader, mean = packed_as.val, (120.5, 110.25, 99.0)
    jpegs = [reader.jpeg(number) for number in range(len(reader))]
    [pixels] = evaluation_pipeline(lambda: (jpegs,), packed_as.options, mean, crops).run()
    for n, jpeg in enumerate(jpegs):
        image = packed_as.shown(jpeg)
        right, bottom = image.shape[1] - CROP, image.shape[0] - CROP
        centre = (right + 1) // 2, (bottom + 1) // 2  # DALI documents that halves are rounded up
        places = [(0, 0), (right, 0), (0, bottom), (right, bottom), centre]
        ten = [crop(image, *place, mirror) for mirror in (False, True) for place in places]
        expected = np.stack(ten) if crops == 10 else crop(image, *centre, mirror=False)
        packed_as.assert_close(np.array(pixels[n]), expected - mean)


def test_the_pictures_include_portrait_and_landscape(packed_as):
    shapes = {packed_as.shown(packed_as.train.jpeg(n)).shape[:2] for n in range(len(packed_as.train))}
    if packed_as.manifest.geometry == "256":
        assert shapes == {(SIZE, SIZE)}
    else:
        assert {np.sign(height - width) for height, width in shapes} >= {-1, 1}
        assert all(min(shape) == SIZE for shape in shapes)


def options_of(width: int, height: int, batch: int = 1024) -> GraphOptions:
    decoding = Decoding(CROP, torch.device("cuda", 0))
    return GraphOptions(decoding, batch, SIZE, max_width=width, max_height=height)


@pytest.mark.parametrize("size", [(256, 256), (500, 375), (1, 1)])
def test_memory_is_reserved_for_the_largest_image(size):
    assert reserved_size(options_of(*size)) == size
    assert reserved_size(options_of(9331, 6589, batch=1)) == (9331, 6589)


@pytest.mark.parametrize("size", [(9331, 6589), (6589, 9331), (65_500, 65_500), (65_500, 1)])
def test_the_memory_reserved_for_large_images_is_bounded(size):
    width, height = reserved_size(options_of(*size, batch=2**16))
    assert 1 <= width < size[0]
    assert height >= 1
    assert (2**16 * width * height * 3 <= RESERVED_BYTES) or height == 1
    if size[1] > 1:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


@pytest.mark.parametrize("resized", [False, True])
def test_no_thread_of_a_gpu_graph_is_bound_to_a_core(resized):
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # another ID needs a GPU
    def graph():
        jpeg = fn.external_source(source=lambda: None)
        options, given = options_of(256, 256), {"mean": 0, "scale": 1, "mirror": 0}
        if resized:
            return augment_resized(jpeg, options, **given, anchor=[0.0, 0.0], shape=[0.5, 0.5])
        return augment(jpeg, options, **given, x=0, y=0)

    serialized = graph().serialize()
    assert b"mixed" in serialized
    assert b"affine\x12\x04bool0\x00" in serialized


def test_nearest_chroma_is_the_chroma_stored_in_the_file(packed):
    """Compare the helper of tests/test_gpu.py with the planes that another decoder gives."""
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    reader = ShardReader(packed, read_manifest(packed), "train")
    for number in range(len(reader)):
        jpeg = bytes(reader.jpeg(number))
        [frame] = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg))
        size = frame.width, frame.height
        planes = [
            Image.frombytes("L", (plane.line_size, plane.height), bytes(plane))
            .crop((0, 0, plane.width, plane.height))
            .resize(size, Image.Resampling.NEAREST)
            for plane in frame.planes
        ]
        expected = np.asarray(Image.merge("YCbCr", planes).convert("RGB"), int)
        found = np.asarray(Image.open(BytesIO(with_nearest_chroma(jpeg))), int)
        assert abs(found - expected).max() <= 7  # two levels in each plane
