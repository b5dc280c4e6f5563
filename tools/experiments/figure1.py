"""Repeat Fig. 1: how much faster a four-layer net learns with ReLU than with tanh.

    alexnet-train paper figure1 --data shards

The training images are reduced to 32 px, as in CIFAR-10, and learned without regularisation. For each
activation, the learning rates of --rates are tried with the first seed, first for five epochs each and then,
from the lowest error on, to the end. A rate is given up once it would need more epochs than the best so far
even if its error went on falling as fast as it does. The rate that reaches --target first is then trained
with the other seeds. Images are kept in memory, 3 KB each. Finished runs are not repeated, and interrupted
ones resume. On CIFAR-10 itself, an epoch takes a CPU core about a minute.
"""

import argparse
import math
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from pipeline.manifest import read_manifest
from pipeline.messages import pluralize
from pipeline.reader import ShardReader
from tools.experiments.plotting import plot_file
from tools.experiments.record import Figure, Record, Row, TrainedRun
from tools.experiments.training import describe, packing
from tools.options import add_device, add_jobs, add_seeds, command_line, count, positive
from trainer.environment import environment

if TYPE_CHECKING:
    from tools.experiments.four_layers import Images

TAKES_SETTINGS = False
LABELS = {"relu": "ReLU", "tanh": "tanh"}
Tried = dict[float, list[float]]  # learning rate → the training error of each epoch
Curves = dict[str, list[list[float]]]  # activation → for each seed, the training error of each epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, default=Path("shards"), metavar="DIR", help="packed dataset (default shards)")
    add(
        "--classes",
        type=count,
        default=10,
        metavar="N",
        help="use the first N classes (default 10, as in CIFAR-10)",
    )
    add(
        "--images",
        type=count,
        default=50_000,
        metavar="N",
        help="use at most N images (default 50,000, as in CIFAR-10)",
    )
    add(
        "--rates",
        type=positive,
        nargs="+",
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        metavar="R",
        help="learning rates to try (default 0.001 0.003 0.01 0.03 0.1)",
    )
    add_seeds(parser, 5)
    add_jobs(parser)
    add(
        "--epochs", type=count, default=60, metavar="N", help="maximum number of epochs of a run (default 60)"
    )
    add("--batch", type=count, default=128, metavar="N", help="batch size (default 128)")
    add(
        "--target",
        type=positive,
        default=25.0,
        metavar="PERCENT",
        help="training error to reach (default 25)",
    )
    add_device(parser)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Train the runs that are not finished and draw figure1.png. Raises DatasetError or SettingsError."""
    manifest = read_manifest(options.data)
    reader = ShardReader(options.data, manifest, "train")
    numbers = chosen(reader.rows["label"], options.classes, options.images)

    from tools.experiments.four_layers import Images, small_images
    from tools.experiments.jobs import run_all
    from trainer.processes import distributed

    world = distributed.join(options.device)
    images = Images(small_images(reader, numbers), reader.rows["label"][numbers], world.device)
    shape = f"{manifest.fingerprint}-{options.classes}-{len(images)}-{options.batch}"
    sweep = Sweep(options, images, options.out / "figure1" / shape)
    found = run_all(sweep.try_rates, (), [(activation,) for activation in LABELS], options.jobs)
    tried = dict(zip(LABELS, found, strict=True))
    rates = {activation: fastest(errors, options.target) for activation, errors in tried.items()}
    trials = [(activation, rates[activation], seed) for activation in LABELS for seed in range(options.seeds)]
    errors = run_all(sweep.train, (options.epochs,), trials, options.jobs)
    curves = {a: errors[index * options.seeds :][: options.seeds] for index, a in enumerate(LABELS)}
    plot(options.out / "figure1.png", curves, options.target)
    steps = math.ceil(len(images) / options.batch)
    return Record(
        experiment="figure1",
        title="Fig. 1: ReLU against tanh",
        source="Fig. 1 and section 3.1, on CIFAR-10",
        data=f"{describe(options.data)}; {len(images):,} training images of the first {images.classes} "
        f"classes at 32 px, batch {options.batch}, {pluralize(options.seeds, 'seed', 'seeds')}; for each net "
        f"the fastest of the learning rates {', '.join(f'{rate:g}' for rate in options.rates)}",
        command=command_line(),
        environment=environment(world.device_name),
        dataset=packing(options.data),
        settings={"epochs": options.epochs, "batch": options.batch, "precision": "fp32"},
        runs=sweep.runs(tried, rates),
        rows=rows(curves, options.target, steps),
        figures=[Figure(file="figure1.png", caption=caption(rates, options.target))],
        remarks=[*remarks(curves, rates, options), table(tried, options.target)],
    )


def chosen(labels: np.ndarray, classes: int, images: int) -> np.ndarray:
    """Return sorted indices of samples of the first classes, chosen at random if there are too many."""
    numbers = np.flatnonzero(labels < classes)
    return np.sort(np.random.default_rng(0).permutation(numbers)[:images])


class Sweep:
    """The runs of one command, kept in a folder."""

    def __init__(self, options: argparse.Namespace, images: "Images", folder: Path):
        self.options, self.images, self.folder = options, images, folder
        self.target = options.target / 100
        folder.mkdir(parents=True, exist_ok=True)

    def try_rates(self, activation: str) -> Tried:
        """Train with each learning rate and seed 0; return the training errors of each epoch.

        A few epochs show which rate is likely to be the fastest. After that one, the others are soon
        given up.
        """
        from tools.experiments.four_layers import SPAN, epochs_to

        epochs = self.options.epochs
        early = {rate: self.train(min(SPAN, epochs), activation, rate, 0) for rate in self.options.rates}
        tried: Tried = {}
        # NaN, of a rate that diverged, comes last.
        for rate in sorted(early, key=lambda rate: (math.isnan(early[rate][-1]), early[rate][-1])):
            best = min((epochs_to(errors, self.target) for errors in tried.values()), default=math.inf)
            tried[rate] = self.train(epochs, activation, rate, 0, best)
        return tried

    def train(
        self, epochs: int, activation: str, rate: float, seed: int, deadline: float = math.inf
    ) -> list[float]:
        """Return the training errors of a run until the target is reached, of at most so many epochs.

        deadline: the number of epochs in which the run must reach the target, lest it is given up.
        """
        from tools.experiments.four_layers import Trial, epochs_to, train

        trial = Trial(activation, rate, seed)
        errors = train(self.images, trial, self.folder, self.options.batch, self.target, epochs, deadline)
        reached = epochs_to(errors, self.target)
        came = f", {self.options.target:g} % after {reached:.1f}" if reached < math.inf else ""
        state = "diverged" if math.isnan(errors[-1]) else f"training error {errors[-1]:.1%}"
        print(f"{trial}: {state} after {pluralize(len(errors), 'epoch', 'epochs')}{came}", flush=True)
        return errors

    def runs(self, tried: dict[str, Tried], rates: dict[str, float]) -> list[TrainedRun]:
        """Return the runs with seed 0 at all rates, and those with the other seeds at the chosen rates."""
        from tools.experiments.four_layers import Trial

        trials = [Trial(activation, rate, 0) for activation in tried for rate in sorted(tried[activation])]
        trials += [Trial(a, rate, seed) for a, rate in rates.items() for seed in range(1, self.options.seeds)]
        return [
            TrainedRun(
                name=trial.activation,
                seed=trial.seed,
                settings={"learning_rate": trial.rate},
                minutes=trial.minutes(self.folder),
            )
            for trial in trials
        ]


def fastest(tried: Tried, target: float) -> float:
    """Return the learning rate that reaches the target (in %) first or, if none does, comes closest."""
    from tools.experiments.four_layers import epochs_to

    def order(rate: float) -> tuple[float, float]:
        errors = [error for error in tried[rate] if not math.isnan(error)]
        return epochs_to(errors, target / 100), min(errors, default=math.inf)

    return min(tried, key=order)


def table(tried: dict[str, Tried], target: float) -> str:
    """Return a Markdown table of the learning rates that were tried."""
    from tools.experiments.four_layers import epochs_to

    def cell(errors: list[float]) -> str:
        reached = epochs_to(errors, target / 100)
        if reached < math.inf:
            return f"{reached:.1f} epochs"
        return "diverged" if math.isnan(errors[-1]) else f"{errors[-1]:.1%} after {len(errors)}"

    rates = sorted(next(iter(tried.values())))
    lines = [
        f"| epochs to {target:g} %, seed 0, at a rate of | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---{'|---' * len(rates)}|",
        *(
            f"| {LABELS[a]} | {' | '.join(cell(errors[rate]) for rate in rates)} |"
            for a, errors in tried.items()
        ),
    ]
    return "\n".join(lines)


def ratios(curves: Curves, target: float) -> list[float]:
    """Return for each seed the epochs of tanh divided by those of ReLU; [] if a run missed the target."""
    from tools.experiments.four_layers import epochs_to

    taken = [[epochs_to(errors, target / 100) for errors in curves[a]] for a in ("tanh", "relu")]
    if math.inf in (*taken[0], *taken[1]):
        return []
    return [tanh / relu for tanh, relu in zip(*taken, strict=True)]


def rows(curves: Curves, target: float, steps: int) -> list[Row]:
    """Return the iterations to the target and, if all seeds reached it, tanh's divided by ReLU's per seed."""
    from tools.experiments.four_layers import epochs_to

    measure, ratio = f"iterations to {target:g} % training error", "ratio of iterations"
    taken = {a: [steps * epochs_to(errors, target / 100) for errors in curves[a]] for a in curves}
    found = [
        Row(system=LABELS[a], measured={measure: values})
        for a, values in taken.items()
        if max(values) < math.inf
    ]
    if values := ratios(curves, target):
        found.append(
            Row(
                system="tanh over ReLU",
                measured={ratio: values},
                published={ratio: 6},
                claims={ratio: "A four-layer net learns several times faster with ReLU than with tanh (3.1)"},
            )
        )
    return found


def remarks(curves: Curves, rates: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Return remarks on nets that missed the target and sweeps whose best rate is at their end."""
    from tools.experiments.four_layers import epochs_to

    found = []
    taken = {a: [epochs_to(errors, options.target / 100) for errors in curves[a]] for a in curves}
    fastest = min(taken, key=lambda activation: mean(taken[activation]))
    for activation, epochs in taken.items():
        short = epochs.count(math.inf)
        times = options.epochs / mean(taken[fastest])
        than = f", {times:.1f} times as many as {LABELS[fastest]} needed" if times else ""
        if short:
            found.append(
                f"{LABELS[activation]} did not reach {options.target:g} % within {options.epochs} epochs "
                f"on {short} of {len(epochs)} seeds{than}."
            )
        if len(options.rates) > 1 and rates[activation] in (min(options.rates), max(options.rates)):
            found.append(
                f"{LABELS[activation]} was fastest at {rates[activation]:g}, an end of the range of learning "
                "rates tried: a rate beyond it may be faster."
            )
    return found


def caption(rates: dict[str, float], target: float) -> str:
    which = " and ".join(f"{LABELS[a]} at a learning rate of {rate:g}" for a, rate in rates.items())
    return f"Training error of a four-layer net until it is {target:g} %: {which}; one line per seed."


def plot(path: Path, curves: Curves, target: float) -> None:
    """Draw the training error over epochs, solid for ReLU and dashed for tanh, and their ratio, as in Fig. 1.

    path: of the PNG file. target: training error in percent.
    """
    from tools.experiments.four_layers import epochs_to

    level = target / 100
    with plot_file(path, height=4.4, dpi=150) as axes:
        for activation, line, colour in (("relu", "-", "C0"), ("tanh", "--", "C3")):
            for seed, errors in enumerate(curves[activation]):
                middles = np.arange(len(errors)) + 0.5  # the errors are averages over their epochs
                label = LABELS[activation] if seed == 0 else None
                axes.plot(middles, errors, line, color=colour, linewidth=1.6, label=label)
        axes.axhline(level, color="gray", linewidth=1, label=f"{target:g} % training error")
        if found := ratios(curves, target):
            relu, tanh = (mean(epochs_to(errors, level) for errors in curves[a]) for a in ("relu", "tanh"))
            axes.annotate(
                "", (relu, level), (tanh, level), arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
            )
            text = f"{mean(found):.1f} times as many epochs"
            if len(found) > 1:
                text += f"\n({min(found):.1f} to {max(found):.1f})"
            axes.annotate(
                text,
                ((relu + tanh) / 2, level),
                (0, -6),
                textcoords="offset points",
                ha="center",
                va="top",
                size=12,
            )
        axes.set_xlabel("epochs", size=12)
        axes.set_ylabel("training error rate", size=12)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=12)
