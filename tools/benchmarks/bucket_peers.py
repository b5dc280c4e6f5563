"""Loaders that read a dataset from a bucket, for tests/remote/compare_loaders.py to compare.

    .loader-peers/bin/python -m tools.benchmarks.bucket_peers read streaming --url s3://bucket/streaming …

The first word is `pack`, which writes the packed images in the loader's own format to the folder --out, or
`read`, which prints a line of JSON for each epoch. Peers run in the environment of `make .loader-peers`, and
`alexnet-train` in the project's. All of them do the work of tools/benchmarks/peer_pipelines.py, on all cores,
and begin with an empty cache on the local disk, as each documentation shows.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.machine import cpus
from pipeline.names import ROOT
from tools.benchmarks.peer_job import Job
from tools.benchmarks.peer_pipelines import MEAN, STD, chunk, import_torchvision, make_transform, opened
from tools.options import command_parser, count

CHUNK_BYTES = "64MB"  # default of both peers


@dataclass(frozen=True)
class Remote:
    """What to read. url: of the dataset in the loader's format, or a local folder of this project's format.

    cache: an empty folder on the local disk.
    """

    url: str
    cache: Path
    batch: int
    crop: int
    threads: int
    epochs: int

    @property
    def job(self) -> Job:
        return Job(Path(), self.batch, self.crop, self.threads)


Epochs = Iterator[Iterable[Any]]  # the batches of each epoch: images, labels


def ours(remote: Remote) -> Epochs:
    from pipeline import Loader, open_dataset

    dataset = open_dataset(remote.url, cache=remote.cache)
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    loader = Loader(
        dataset, remote.batch, remote.crop, mean=mean, std=std, threads=remote.threads, device="cpu"
    )
    return (loader.epoch(number) for number in range(remote.epochs))


def litdata(remote: Remote) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # for which it has no option
    transform = make_transform(remote.job)

    def decoded(sample: dict[str, Any]) -> tuple[Any, int]:
        return transform(opened(sample["image"])), sample["class"]

    images = StreamingDataset(
        remote.url, cache_dir=str(remote.cache), shuffle=True, drop_last=True, transform=decoded
    )
    how: dict[str, Any] = {"num_workers": remote.threads, "persistent_workers": True}
    loader = StreamingDataLoader(images, batch_size=remote.batch, multiprocessing_context="fork", **how)
    return (loader for _ in range(remote.epochs))


def streaming(remote: Remote) -> Epochs:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    transform = make_transform(remote.job)

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return transform(opened(sample["image"])), sample["class"]

    images = Images(remote=remote.url, local=str(remote.cache), shuffle=True, batch_size=remote.batch)
    how: dict[str, Any] = {"num_workers": remote.threads, "persistent_workers": True}
    loader: DataLoader = DataLoader(images, remote.batch, drop_last=True, **how)
    return (loader for _ in range(remote.epochs))


def pack_litdata(job: Job, output: Path) -> None:
    from litdata import optimize

    inputs = list(job.samples())
    optimize(
        fn=chunk, inputs=inputs, output_dir=str(output), num_workers=job.threads, chunk_bytes=CHUNK_BYTES
    )


def pack_streaming(job: Job, output: Path) -> None:
    import_torchvision()  # which the next import needs
    from streaming import MDSWriter

    with MDSWriter(out=str(output), columns={"image": "bytes", "class": "int"}) as writer:
        for jpeg, label in job.samples():
            writer.write({"image": jpeg, "class": label})


# Each loader, and the modules whose import is not measured.
READERS: dict[str, tuple[Callable[[Remote], Epochs], tuple[str, ...]]] = {
    "alexnet-train": (ours, ("nvidia.dali.fn", f"{ROOT}pipeline.training", f"{ROOT}pipeline.dataset")),
    "litdata": (litdata, ("litdata",)),
    "streaming": (streaming, ("streaming",)),
}
PACKERS = {"litdata": pack_litdata, "streaming": pack_streaming}


def read(name: str, remote: Remote) -> Iterator[dict[str, Any]]:
    """Yield for each epoch its seconds, the seconds until its first batch, and its number of images."""
    reader, modules = READERS[name]
    if reader is not ours:
        import_torchvision()
    for module in modules:
        import_module(module)
    begun = time.perf_counter()
    for number, batches in enumerate(reader(remote), 1):
        images, first = 0, None
        for _, labels in batches:
            first = first or time.perf_counter() - begun
            images += len(labels)
        end = time.perf_counter()
        yield {"epoch": number, "seconds": end - begun, "first_batch_seconds": first, "images": images}
        begun = end


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("action", choices=("pack", "read"))
    add("loader", choices=READERS, help="loader to run")
    add("--data", type=Path, metavar="DIR", help="packed dataset, which `pack` converts")
    add("--out", type=Path, metavar="DIR", help="new folder, into which `pack` writes")
    add("--url", metavar="URL", help="dataset that `read` reads")
    add("--cache", type=Path, metavar="DIR", help="empty folder for the cache")
    add("--batch", type=count, default=128, metavar="N", help="batch size (default 128)")
    add("--crop", type=count, default=224, metavar="PX", help="side of the crop (default 224)")
    add("--threads", type=count, default=cpus(), metavar="N", help="threads or processes (default: CPUs)")
    add("--epochs", type=count, default=3, metavar="N", help="epochs to read (default 3)")
    options = parser.parse_args()
    try:
        if options.action == "pack":
            job = Job(options.data, options.batch, options.crop, options.threads)
            job.check()
            PACKERS[options.loader](job, options.out)
            return
        size = options.batch, options.crop, options.threads, options.epochs
        for line in read(options.loader, Remote(options.url, options.cache, *size)):
            print(json.dumps(line), flush=True)
    except ImportError as error:
        sys.exit(f"bucket_peers: {options.loader} is not installed in {sys.prefix}: {error}")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"bucket_peers: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
