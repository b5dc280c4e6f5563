"""Datasets with weights, drawn at random for property tests."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from pipeline.composition import Composition


class Weighted(NamedTuple):
    """The labels of each dataset's samples, the datasets' weights, and how far their classes are balanced."""

    labels: list[np.ndarray]
    weights: list[float]
    balance: float

    def composition(self) -> Composition:
        """Return a new composition, which has no state of earlier epochs."""
        return Composition.of(self.labels, self.weights, self.balance)


@st.composite
def weighted(draw: st.DrawFn, samples: int) -> Weighted:
    """Draw one to three datasets with `samples` samples in all, in which classes may be missing."""
    cuts = draw(st.sets(st.integers(1, samples - 1), max_size=2)) if samples > 1 else set()
    labels = draw(st.lists(st.integers(0, 4), min_size=samples, max_size=samples))
    weight = st.one_of(st.floats(0.001, 1), st.integers(1, 5))
    return Weighted(
        labels=np.split(np.array(labels), sorted(cuts)),
        weights=[draw(weight) for _ in range(len(cuts) + 1)],
        balance=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    )
