"""The arguments that the loaders share: their defaults and their checks."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist

from pipeline import machine
from pipeline.colour import COLOURS
from pipeline.graph import DTYPES, Decoding
from pipeline.manifest import RGB
from pipeline.ranks import Ranks, RanksError, read_ranks


class LoaderError(ValueError):
    """A loader cannot do what it was asked to do; the message says why, in one line."""


class DecodingOptions(TypedDict, total=False):
    """Options that all loaders have, and that change where and how fast images are decoded, but not which.

    dtype: the type of the pixels: torch.float32, torch.float16 or, without `mean` and `std`, torch.uint8; by
    default float16 on a GPU and float32 on a CPU. device: by default torch's current GPU, or the CPU if there
    is none. threads: number of decoding threads, by default this process's share of the CPUs. prefetch:
    number of batches to prepare ahead. hw_decoder_load: fraction of the images that a GPU's JPEG engine
    decodes. cores: indices of the cores that threads are pinned to; by default one for each thread on a CPU.
    pipelines: number of DALI pipelines that prepare training batches in turn, with so many threads each.
    """

    dtype: torch.dtype | None
    device: torch.device | str | None
    threads: int | None
    prefetch: int
    hw_decoder_load: float
    cores: tuple[int, ...] | None
    pipelines: int


def make_decoding(
    crop: int,
    ranks: Ranks,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    prefetch: int = 2,
    hw_decoder_load: float = Decoding.hw_decoder_load,
    cores: tuple[int, ...] | None = None,
    pipelines: int = 1,
) -> Decoding:
    """Return how to decode in a process. Raises LoaderError.

    ranks: those of the process, which shares the CPUs with others. Other arguments: see DecodingOptions.
    """
    if dtype not in (None, *DTYPES):
        raise LoaderError(f"dtype must be {' or '.join(map(str, DTYPES))}, not {dtype}")
    numbers = {"crop": crop, "threads": threads, "prefetch": prefetch, "pipelines": pipelines}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise LoaderError(f"{name} must be 1 or more, not {value}")
    if not 0 <= hw_decoder_load <= 1:
        raise LoaderError(f"hw_decoder_load must be from 0 to 1, not {hw_decoder_load}")
    chosen = _find_device(device)
    share = machine.share_of_cpus(ranks.local_world_size)
    count = threads or max(1, share)
    if cores is None:
        own = _own_cores(share, ranks.local_rank) if chosen.type == "cpu" else ()
        cores = own if len(own) == count else ()
    return Decoding(crop, chosen, count, prefetch, hw_decoder_load, cores, pipelines, dtype)


def _find_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is meant, with its index if it is a GPU. Raises LoaderError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        chosen = torch.device(device or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise LoaderError(f"device must be cpu, cuda or cuda:N, not {device}") from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise LoaderError(f"device must be cpu, cuda or cuda:N, not {device}")
    if (chosen.index or 0) >= gpus:
        raise LoaderError(f"device {device}: torch finds {gpus} GPUs here, counted from 0")
    return chosen if chosen.index is not None else torch.device("cuda", torch.cuda.current_device())


def _own_cores(share: int, local_rank: int) -> tuple[int, ...]:
    """Return this process's share of the cores that it may run on.

    Decoding threads are pinned to them. Otherwise, the thread that feeds the decoder would displace a
    decoding thread to the core of another one, and the two would share that core while a third core is idle.
    """
    allowed = machine.cores()
    if not share or not allowed:
        return ()
    processes = len(allowed) // share  # that may run on these cores
    return allowed[local_rank % processes * share :][:share]


def find_ranks(rank: int | None, world: int | None) -> Ranks:
    """Return the ranks that were given, or those of torch.distributed or torchrun. Raises LoaderError."""
    try:
        launched = read_ranks()
    except RanksError as error:
        raise LoaderError(str(error)) from None
    if rank is None and world is None:
        if not (dist.is_available() and dist.is_initialized()):
            return launched
        rank, world = dist.get_rank(), dist.get_world_size()
    if rank is None or world is None:
        raise LoaderError("rank and world must be given together")
    if not 0 <= rank < world:
        raise LoaderError(f"rank {rank} is not one of the {world} processes, which are counted from 0")
    if launched.is_launched:
        return launched._replace(rank=rank, world_size=world)
    return Ranks(rank, world, rank, world, False)  # all of them are assumed to be on this machine


def normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, decoding: Decoding
) -> dict[str, Any]:
    """Return the arguments `mean` and `std` of the streams. Raises LoaderError if they cannot be used."""
    if decoding.output == torch.uint8:
        if mean is not None or std is not None:
            raise LoaderError("pixels of type torch.uint8 are not normalised: omit mean and std")
        mean = 0.0, 0.0, 0.0
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (np.shape(values) != (3,) or not np.isfinite(values).all()):
            raise LoaderError(f"{name} must be three numbers, for red, green and blue, not {values}")
    if std is not None and min(std) < 1:
        raise LoaderError(
            f"std is on the 0–255 scale of the pixels, where {tuple(std)} is too small: "
            "multiply mean and std by 255 if they are on the 0–1 scale"
        )
    return {"mean": _rgb(mean), "std": _rgb(std) or (1.0, 1.0, 1.0)}


def _rgb(values: Sequence[float] | None) -> RGB | None:
    return None if values is None else (float(values[0]), float(values[1]), float(values[2]))


def check_augmentation(
    seed: int, scale: tuple[float, float] | None, ratio: tuple[float, float], colour: str, crop_chunk: int
) -> None:
    """Raise LoaderError if the arguments of `Loader` cannot be used."""
    if seed < 0:
        raise LoaderError(f"the seed must be a whole number from 0, not {seed}")
    if colour not in COLOURS:
        raise LoaderError(f"colour must be {', '.join(COLOURS[:-1])} or {COLOURS[-1]}, not {colour}")
    if scale is None:
        return
    if not 0 < scale[0] <= scale[1] <= 1:
        raise LoaderError(f"scale must be two shares of the area, such as (0.08, 1), not {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise LoaderError(f"ratio must be two bounds of width / height, such as (3/4, 4/3), not {ratio}")
    if crop_chunk > 1:
        raise LoaderError("crop_chunk is for crops without resizing: omit crop_chunk or scale")


def check_balance(balance: float, split: str) -> None:
    """Raise LoaderError if classes cannot be balanced so."""
    if not 0 <= balance <= 1:
        raise LoaderError(f"balance must be from 0 to 1, not {balance}")
    if balance and split != "train":
        raise LoaderError(f"only the classes of the split train can be balanced, not those of {split}")
