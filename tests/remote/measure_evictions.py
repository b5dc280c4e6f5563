"""Measure what a loader with a small cache fetches from a bucket, beside the least possible and LRU.

    python tests/remote/measure_evictions.py --data shards --cache 0.333 --shuffle-window 4

The dataset is uploaded to SeaweedFS on this machine. One process reads training batches of it by `Loader`,
with a cache for a part of the training shards. For each epoch, a line has the bytes of training shards that
were sent, and what the simulation of tools/benchmarks/traffic.py fetches by the same plan if it evicts the
shard that is needed last, which is the least possible for whole shards, or the one that was used least
recently.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from s3fs import S3FileSystem

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pipeline.reader
from pipeline import Loader, open_dataset
from pipeline.manifest import read_manifest
from pipeline.plan import Plan
from tests.remote.faulty_proxy import FaultyProxy
from tests.remote.seaweedfs import served
from tests.trees import upload
from tools.benchmarks.traffic import POLICIES, fetches, uses_by_host
from tools.options import command_parser, count

TRAIN = re.compile(r"/train-\d+\.tar$")


def simulated(plan: Plan, sizes: np.ndarray, cache_bytes: int, policy: str) -> np.ndarray:
    """Return the bytes that one host fetches in each epoch of the simulation."""
    [(uses, epochs)] = uses_by_host(plan, 1)
    capacity = int(cache_bytes // sizes.max())
    return np.bincount(epochs, sizes[uses] * fetches(uses.tolist(), capacity, policy))


def measure(options: argparse.Namespace, cache: Path, server: str) -> Iterator[str]:
    """Read two epochs through a proxy; yield the lines of the result."""
    with FaultyProxy(server) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        S3FileSystem.clear_instance_cache()
        sizes = np.array([shard.bytes for shard in read_manifest(options.data).split("train").shards])
        cache_bytes = int(options.cache * sizes.sum())
        dataset = open_dataset("s3://bucket/shards", cache=cache, cache_size=str(cache_bytes))
        window = options.shuffle_window
        with Loader(dataset, options.batch, 32, shuffle_window=window, device="cpu") as loader:
            least, lru = (simulated(loader.plan, sizes, cache_bytes, policy) for policy in POLICIES)
            yield f"{len(sizes)} shards of {sizes.sum() / 1e6:.1f} MB, a cache of {cache_bytes / 1e6:.1f} MB"
            yield "epoch  fetched    least      LRU  (MB)"
            before = 0
            for epoch in range(2):
                for _ in loader.epoch(epoch):
                    pass
                sent = sum(each.bytes for path, each in list(proxy.traffic.items()) if TRAIN.search(path))
                figures = (figure / 1e6 for figure in (sent - before, least[epoch], lru[epoch]))
                yield f"{epoch:5}" + "".join(f"{figure:9.1f}" for figure in figures)
                before = sent


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="packed dataset")
    add("--cache", type=float, default=1 / 3, metavar="SHARE", help="of the training shards (default 1/3)")
    add("--shuffle-window", type=count, default=4, metavar="N", help="shards in a window (default 4)")
    add("--batch", type=count, default=32, metavar="N", help="batch size (default 32)")
    options = parser.parse_args()
    pipeline.reader.memory_bytes = lambda: 0  # otherwise a small dataset is kept in memory
    with tempfile.TemporaryDirectory(prefix="evictions-") as folder, served(Path(folder, "server")) as server:
        upload(options.data, "s3://bucket/shards")
        for line in measure(options, Path(folder, "cache"), server):
            print(line, flush=True)


if __name__ == "__main__":
    main()
