"""Retrieve images by short binary codes, as section 6.1 of the paper proposes without trying it.

    alexnet-train paper codes runs/a

An auto-encoder learns to compress the 4096 activations of the last hidden layer to a few bits. Training
images are then found by the Hamming distance between their codes and a validation image's, and compared with
the results of an exact search in L2. Random hyperplanes and the signs of principal components serve as
baselines for the auto-encoder. The activations are computed once and kept in --out; those learned from are
held in memory, 16 KB per image.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from tools.experiments import finished
from tools.experiments.plotting import plot_file
from tools.experiments.record import Figure, Measures, Record, Row
from tools.options import add_seeds, count
from trainer.settings import SettingsError

if TYPE_CHECKING:
    import torch

TAKES_SETTINGS = False
NEAREST = 10  # neighbours found by the exact search in L2
FOUND = 100  # images that a search by codes returns, for a finer search to choose from
RECALL = f"recall of the {NEAREST} nearest in {NEAREST} results (%)"
CLASS = "first 6 results of the query's class (%)"
SPEED = "search time per query, one CPU thread (ms)"
TIMED = 20  # queries with which the exact search is timed
CAPTION = "Retrieval by binary codes. Each point is one seed, and the lines join the means."
AUTO, PCA, RANDOM = "auto-encoder", "signs of principal components", "random hyperplanes"
Systems = dict[tuple[str, int], Measures]  # by method and bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser)
    add = parser.add_argument
    add(
        "--bits",
        type=count,
        nargs="+",
        default=[32, 64, 128],
        metavar="N",
        help="lengths of the codes (default 32 64 128)",
    )
    add_seeds(parser)
    add(
        "--epochs",
        type=count,
        default=20,
        metavar="N",
        help="training epochs of the auto-encoder (default 20)",
    )
    add(
        "--learn",
        type=count,
        default=50_000,
        metavar="N",
        help="number of training images to learn from (default 50,000)",
    )
    add(
        "--queries",
        type=count,
        default=500,
        metavar="N",
        help="number of validation images to search with (default 500)",
    )


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Learn codes, search by them and draw codes.png.

    Raises SettingsError and what `cached_features` raises.
    """
    for bits in options.bits:
        if bits % 8:
            raise SettingsError(f"--bits {bits}: codes are whole bytes, choose a multiple of 8")
    opened = finished.open_run(options, "train", "val")
    dataset, device = opened.trained.dataset, opened.world.device
    labels, val_labels = (dataset.reader(split).rows["label"] for split in ("train", "val"))
    if min(options.learn, len(labels)) < max(options.bits):
        raise SettingsError(
            f"--bits {max(options.bits)}: principal components need at least as many training images, and "
            f"there are {min(options.learn, len(labels))} to learn from: use fewer bits or a larger --learn"
        )

    from tools.experiments.fc7 import cached_features, nearest, take

    index, val = (cached_features(opened, split, options.out) for split in ("train", "val"))
    chosen = drawn(len(val_labels), options.queries, seed=0)
    queries, query_labels = take(val, chosen), val_labels[chosen]
    _, exact = nearest(queries, index, NEAREST, device)
    _, seconds = search_exactly(index, queries[:TIMED])

    def judge(found: np.ndarray) -> dict[str, float]:
        return recalls(found, exact) | {CLASS: same_class(found, labels, query_labels)}

    systems = measure(options, index, queries, device, judge)
    best = same_class(exact, labels, query_labels)
    plot(options.out / "codes.png", systems, best)
    measured = {CLASS: [best], SPEED: [1000 * seconds]}
    exact_name = f"exact L2, {2 * queries.shape[1]:,} bytes per image"
    return Record(
        experiment="codes",
        title="Retrieval by short binary codes",
        source="section 6.1, which proposes it as future work",
        rows=[Row(system=exact_name, measured=measured), *rows(systems)],
        remarks=[
            f"{len(queries):,} validation images were queries against {len(labels):,} training images. Among "
            "images at the same Hamming distance, of which short codes have many, the first in the dataset "
            "are taken.",
            f"Search times are those of finding the first {FOUND} images for one query at a time on one CPU "
            "thread, with the activations (in fp32) and the codes (in words of up to 64 bits) in memory. The "
            "neighbours to be found are those of a search in fp64.",
        ],
        figures=[Figure(file="codes.png", caption=CAPTION)],
        **opened.about(),
    )


def drawn(total: int, count: int, seed: int) -> np.ndarray:
    """Draw at most `count` of a split's samples; return their sorted indices."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def recalls(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return recalls in percent. found: indices by codes [queries,FOUND]. exact: in L2 [queries,NEAREST]."""

    def recall(nearest: int, among: int) -> float:
        hits = [np.isin(e[:nearest], f[:among]).mean() for e, f in zip(exact, found, strict=True)]
        return float(100 * np.mean(hits))

    return {
        RECALL: recall(NEAREST, NEAREST),
        "recall of the 6 nearest in 6 results (%)": recall(6, 6),
        f"recall of the 6 nearest in {FOUND} results (%)": recall(6, FOUND),
    }


def same_class(found: np.ndarray, labels: np.ndarray, query_labels: np.ndarray) -> float:
    """Return the percentage of the first six results [queries,n] that have the query's class [queries]."""
    return float(100 * (labels[found[:, :6]] == query_labels[:, None]).mean())


def measure(
    options: argparse.Namespace,
    index: list[np.ndarray],
    queries: np.ndarray,
    device: "torch.device",
    judge: Callable[[np.ndarray], dict[str, float]],
) -> Systems:
    """Measure every method at every number of bits, seed by seed. judge: maps found indices to scores."""
    import torch

    from tools.experiments import binary_codes
    from tools.experiments.fc7 import take

    methods: dict[str, Callable[[torch.Tensor, int, int], binary_codes.Encoder]] = {
        RANDOM: binary_codes.random_hyperplanes,
        PCA: binary_codes.pca_signs,
        AUTO: partial(binary_codes.auto_encoder, epochs=options.epochs),
    }
    systems: Systems = {}
    for seed in range(options.seeds):
        learned = take(index, drawn(sum(map(len, index)), options.learn, seed))
        sample = torch.from_numpy(learned).to(device).float()
        for bits, (name, learn) in product(options.bits, methods.items()):
            encoder = learn(sample, bits, seed)
            codes = binary_codes.encode(encoder, index, device)
            found, seconds = search(codes, binary_codes.encode(encoder, [queries], device))
            for what, value in (judge(found) | {SPEED: 1000 * seconds}).items():
                systems.setdefault((name, bits), {}).setdefault(what, []).append(value)
            recall = systems[name, bits][RECALL][-1]
            print(f"seed {seed}: {name}, {bits} bits: {recall:.1f} % of the {NEAREST} nearest", flush=True)
    return systems


def search(codes: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the indices [queries,FOUND] of the codes nearest to each query, and the median seconds."""
    from tools.experiments.binary_codes import nearest_codes

    found, seconds = [], []
    for query in queries:
        begun = time.perf_counter()
        found.append(nearest_codes(query, codes, FOUND))
        seconds.append(time.perf_counter() - begun)
    return np.stack(found), median(seconds)


def search_exactly(index: list[np.ndarray], queries: np.ndarray) -> tuple[np.ndarray, float]:
    """Return what `search` does for activations [n,d] in L2, computed in fp32 on one CPU thread as well.

    Converting the activations and summing their squares is not timed; neither is encoding.
    """
    import torch

    points, seconds = torch.from_numpy(queries).float(), np.zeros(len(queries))
    parts, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in index:
            rows = torch.from_numpy(part.astype(np.float32))
            squares, own = rows.square().sum(1), []
            for number, point in enumerate(points):
                begun = time.perf_counter()
                own.append(torch.addmv(squares, rows, point, alpha=-2))
                seconds[number] += time.perf_counter() - begun
            parts.append(torch.stack(own))
        found = []
        for number, distances in enumerate(torch.cat(parts, 1)):
            begun = time.perf_counter()
            found.append(distances.topk(min(FOUND, len(distances)), largest=False).indices)
            seconds[number] += time.perf_counter() - begun
    finally:
        torch.set_num_threads(threads)
    return torch.stack(found).numpy(), float(np.median(seconds))


def rows(systems: Systems) -> list[Row]:
    """Return rows; the auto-encoder is compared with the best untrained method at the same number of bits."""

    def named(name: str, bits: int) -> str:
        return f"{name}, {bits} bits"

    return [
        Row(system=named(name, bits), measured=measured, than=named(PCA, bits) if name == AUTO else "")
        for (name, bits), measured in systems.items()
    ]


def plot(path: Path, systems: Systems, best: float) -> None:
    """Draw recall and the share of the correct class by number of bits. best: the exact search's share."""
    with plot_file(path, height=3.6, width=9, panels=2) as panels:
        for name, colour in ((AUTO, "C0"), (PCA, "C1"), (RANDOM, "C7")):
            own = {bits: measured for (method, bits), measured in systems.items() if method == name}
            for panel, what in zip(panels, (RECALL, CLASS), strict=True):
                panel.plot(
                    list(own), [mean(measured[what]) for measured in own.values()], color=colour, label=name
                )
                for bits, measured in own.items():
                    panel.plot([bits] * len(measured[what]), measured[what], ".", color=colour)
                panel.set(xlabel="bits", ylabel=what, ylim=(0, 100), xscale="log")
                panel.set_xticks(list(own), [str(bits) for bits in own])
                panel.minorticks_off()
                panel.grid(alpha=0.3)
        panels[1].axhline(best, color="black", linewidth=0.8, linestyle=":", label="exact L2")
        panels[1].legend(loc="lower right")
