"""The goals of the stages of `alexnet-train bench`, and whether the measured figures reach them."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles
from typing import Any, NamedTuple

Figures = dict[str, list[float]]  # candidate → a figure for each run

RESAMPLES = 10_000


class Gate(NamedTuple):
    """The goal of a stage's first candidate: a multiple of other candidates' figures, or an amount."""

    stage: str
    goal: float
    others: tuple[str, ...] = ()
    pick: Callable[..., float] = max  # chooses the figure of several others that counts, in each run
    where: Mapping[str, object] = {}  # values of Stages.describe() for which the gate applies
    at_most: bool = False

    def applies(self, about: Mapping[str, object]) -> bool:
        return all(about[name] == value for name, value in self.where.items())


@dataclass(frozen=True)
class Judgement:
    """A gate and its result.

    over: the other candidates that were measured. reached: for each run, the ratio to them in the same round
    or, if there are none, the figure itself.
    """

    gate: Gate
    over: list[str]
    reached: list[float]

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the median, by percentiles of a bootstrap over the runs (Efron, 1979).

        It is deterministic; for five runs or fewer it is their range.
        """
        draw = random.Random(0)
        resampled = (draw.choices(self.reached, k=len(self.reached)) for _ in range(RESAMPLES))
        low, *_, high = quantiles(map(median, resampled), n=40)
        return low, high

    @property
    def verdict(self) -> str:
        """`passed` if the median reaches the goal, `undecided` if only the interval does, else `missed`."""
        sign = -1 if self.gate.at_most else 1
        goal = sign * self.gate.goal
        if sign * median(self.reached) >= goal:
            return "passed"
        return "undecided" if max(sign * bound for bound in self.interval) >= goal else "missed"

    def record(self) -> dict[str, Any]:
        return {
            "goal": self.gate.goal,
            "at_most": self.gate.at_most,
            "over": self.over,
            ("ratio" if self.over else "amount"): median(self.reached),
            "interval": self.interval,
            "verdict": self.verdict,
        }

    def line(self, unit: str) -> str:
        """Return the result as one line. unit: the unit of an amount."""
        gate, digits = self.gate, ",.3f" if self.over else ",.1f"
        low, high = self.interval
        several = f"the {'fastest' if gate.pick is max else 'slowest'} of " * (len(self.over) > 1)
        of = f"× {several}{', '.join(self.over)}" if self.over else unit
        missing = [name for name in gate.others if name not in self.over]
        of += f" (not measured: {', '.join(missing)})" if missing else ""
        limit = f"at {'most' if gate.at_most else 'least'} {gate.goal:,g}"
        verdict = {"undecided": "undecided; more --runs may decide it", "missed": "MISSED"}
        found = f"{median(self.reached):{digits}} (95 %: {low:{digits}} to {high:{digits}})"
        return f"{found} {of}; {limit}: {verdict.get(self.verdict, self.verdict)}"


STOCK = ("stock NCHW", "stock channels_last", "stock compiled")
CPU, GPU = {"device": "cpu"}, {"device": "cuda"}

GATES = (
    Gate("read", 1.0, ("DALI's reader",)),
    Gate("loader", 1.0, ("DALI's reader",)),
    Gate("loader", 50_000, where=GPU | {"geometry": "256"}),
    Gate("loader", 15_000, where=GPU | {"geometry": "original"}),
    Gate("peers", 2.0, ("pytorch", "timm", "webdataset", "spdl", "litdata", "streaming")),
    Gate("peers", 1.1, ("ffcv", "dali"), where=CPU),
    Gate("peers", 2.0, ("ffcv",), where=GPU),  # which decodes on the CPU even if there is a GPU
    Gate("model", 1.9, STOCK, where=CPU | {"precision": "fp32"}),
    Gate("model", 3.3, STOCK, where=CPU | {"precision": "bf16", "amx": True}),
    Gate("model", 1.5, STOCK, where=GPU),
    Gate("model", 80_000, where=GPU),
    Gate("start", 25, where=GPU, at_most=True),
    Gate("memory", 8, where=GPU, at_most=True),
    Gate("train", 0.97, ("loader alone", "model alone"), pick=min),
    Gate("pack", 1.4, ("shardwriter",)),
    Gate("pack", 1.0, ("img2dataset",)),
)


def judge(
    stage: str, figures: Figures, about: Mapping[str, object], gates: Sequence[Gate] = GATES
) -> Iterator[Judgement]:
    """Yield a judgement for each gate of the stage that applies and was measured."""
    ours = next(iter(figures.values()), [])
    for gate in gates:
        if gate.stage != stage or not ours or not gate.applies(about):
            continue
        over = [name for name in gate.others if figures.get(name)]
        if over or not gate.others:
            theirs = (figures[name] for name in over)
            reached = [a / gate.pick(b, default=1.0) for a, *b in zip(ours, *theirs, strict=True)]
            yield Judgement(gate, over, reached)
