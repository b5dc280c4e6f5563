"""The baselines' features on disk: learned encoders, and pictures encoded in chunks, which can be resumed.

Each encoder has a folder with encoder.npz and <split>-<number>.npy, float16 [pictures,length]. Files are
written atomically, so those that exist are complete and are reused. A picture's features depend only on the
picture and the encoder, not on the workers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from threadpoolctl import threadpool_limits

from pipeline.duration import duration
from pipeline.files import atomic_write
from pipeline.manifest import DatasetError, read_manifest
from pipeline.plan import epoch_order
from pipeline.reader import ShardReader
from tools.experiments.encoders import COMPONENTS, Encoder, Fisher, Sparse, dense_sift
from tools.experiments.kept import reading
from tools.experiments.training import TrainingError
from trainer.settings import SettingsError

CHUNK = 256  # pictures in a file
ENCODERS: dict[str, type[Encoder]] = {"fisher": Fisher, "sparse": Sparse}
_FROM_A_PICTURE = 64  # minimum number of descriptors that learning takes from each picture
_LINE_SECONDS = 10.0


class Pictures(NamedTuple):
    """A dataset's pictures as descriptors. limit: use at most so many of a split."""

    data: Path
    limit: int | None
    step: int
    scales: int

    def chunks(self, split: str) -> list[np.ndarray]:
        """Return a split's sample indices in a fixed random order, CHUNK at a time.

        Shards may be sorted by class; thanks to the random order a limit takes samples of all classes.
        """
        samples = [shard.samples for shard in _manifest(self.data).split(split).shards]
        order = epoch_order(0, 0, samples)[: self.limit]
        return np.split(order, range(CHUNK, len(order), CHUNK))

    def labels(self, split: str) -> list[np.ndarray]:
        """Return the labels of each chunk."""
        return [
            _reader(self.data, split).rows["label"][chunk].astype(np.int64) for chunk in self.chunks(split)
        ]

    def descriptors(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `dense_sift` does for a sample. Raises DatasetError if it cannot be decoded."""
        reader, side = _reader(self.data, split), _manifest(self.data).size
        return dense_sift(_grey(reader, number, side), self.step, self.scales)


_manifest = lru_cache(read_manifest)


@lru_cache
def _reader(data: Path, split: str) -> ShardReader:
    return ShardReader(data, _manifest(data), split)


def _grey(reader: ShardReader, number: int, side: int) -> np.ndarray:
    """Resize the shorter side to `side` if needed and return the central square, uint8 (section 2)."""
    # The packer has already applied the orientation.
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(reader.jpeg(number), np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise DatasetError(f"the sample in {reader.location(number)} cannot be decoded: copy the shard again")
    height, width = image.shape
    if min(height, width) != side:
        ratio = side / min(height, width)
        width, height = max(side, round(width * ratio)), max(side, round(height * ratio))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


class Store(NamedTuple):
    """The folder of one encoder. kind: a key of ENCODERS. words: number of Gaussians or atoms."""

    folder: Path
    kind: str
    words: int
    seed: int

    def chunk(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:05d}.npy"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder.npz"


def learn(pictures: Pictures, stores: Sequence[Store], count: int, workers: int) -> None:
    """Learn the missing encoders, each from `count` descriptors of the training pictures.

    Raises SettingsError if there are too few descriptors, and what `encode` does.
    """
    missing = [store for store in stores if not store.encoder.exists()]
    for store in _parallel(workers, _learn, [(pictures, store, count) for store in missing]):
        print(f"learned {store.folder.name}", flush=True)


def encode(pictures: Pictures, stores: Sequence[Store], workers: int) -> None:
    """Encode the missing chunks of both splits, printing progress.

    Raises DatasetError for a picture that cannot be decoded, TrainingError if a worker process dies, OSError.
    """
    tasks, images = [], 0
    for split in ("train", "val"):
        for number, chunk in enumerate(pictures.chunks(split)):
            missing = [store for store in stores if not store.chunk(split, number).exists()]
            if missing:
                tasks.append((pictures, split, number, chunk, missing))
                images += len(chunk)
    begun = said = time.monotonic()
    done = 0
    for count in _parallel(workers, _encode, tasks):
        done += count
        now = time.monotonic()
        if now - said > _LINE_SECONDS or done == images:
            said, rate = now, done / (now - begun)
            left = duration((images - done) / rate)
            print(f"encoded {done:,} of {images:,} images, {rate:.1f} images/s, {left} left", flush=True)


def bytes_to_come(pictures: Pictures, stores: Sequence[Store]) -> int:
    """Return the bytes that the missing chunks will take; all encoders must exist."""
    return sum(
        len(chunk) * load_encoder(store).length * np.dtype(np.float16).itemsize
        for split in ("train", "val")
        for number, chunk in enumerate(pictures.chunks(split))
        for store in stores
        if not store.chunk(split, number).exists()
    )


def _parallel(workers: int, function: Callable, tasks: Sequence[tuple]) -> Iterator:
    """Yield the function's results in the order in which tasks end; one worker means this process."""
    calls = (delayed(function)(*task) for task in tasks)
    try:
        yield from Parallel(workers, return_as="generator_unordered")(calls)
    except TerminatedWorkerError:
        raise TrainingError(
            "a worker process was killed, perhaps because memory ran out: try fewer --workers. "
            "Encoded pictures are kept, and the same command continues"
        ) from None


def _learn(pictures: Pictures, store: Store, count: int) -> Store:
    rng = np.random.default_rng(store.seed)
    parts = []
    # One thread: with several, the order of sums varies, and so do the last digits.
    with threadpool_limits(1):
        numbers = np.concatenate(pictures.chunks("train"))
        each = max(_FROM_A_PICTURE, -(-count // len(numbers)))
        for number in rng.permutation(numbers)[: -(-count // each)]:
            descriptors, _ = pictures.descriptors("train", number)
            parts.append(rng.permutation(descriptors)[:each])
        found = np.concatenate(parts)
        usable = int(found.any(axis=1).sum())
        if usable < max(store.words, COMPONENTS):
            raise SettingsError(
                f"{usable:,} patches with a gradient are too few to learn {store.words:,} words, at least "
                f"{COMPONENTS} are needed: raise --limit or --vocabulary, or lower --gaussians, --atoms"
            )
        encoder = ENCODERS[store.kind].fit(found, store.words, store.seed)
    store.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(store.encoder) as file:
        np.savez(file, **vars(encoder))
    return store


@lru_cache
def load_encoder(store: Store) -> Encoder:
    with reading(store.encoder), np.load(store.encoder) as arrays:
        return ENCODERS[store.kind](**arrays)


def _encode(pictures: Pictures, split: str, number: int, chunk: np.ndarray, stores: Sequence[Store]) -> int:
    """Write a chunk's files; return its number of pictures."""
    encoders = [load_encoder(store) for store in stores]
    features = [np.empty((len(chunk), encoder.length), np.float16) for encoder in encoders]
    _reader(pictures.data, split).prefetch(chunk)
    with threadpool_limits(1):
        for index, sample in enumerate(chunk):
            descriptors, places = pictures.descriptors(split, sample)
            for encoder, rows in zip(encoders, features, strict=True):
                rows[index] = encoder.encode(descriptors, places)
    for store, rows in zip(stores, features, strict=True):
        with atomic_write(store.chunk(split, number)) as file:
            np.save(file, rows)
    return len(chunk)
