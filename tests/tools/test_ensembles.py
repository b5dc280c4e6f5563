"""Averages of nets compared with numpy."""

import numpy as np
import pytest

from tools.experiments.ensembles import ONE, ONE_STAR, average, rows
from tools.experiments.predictions import errors
from tools.experiments.record import TOP1, TOP5

LABELS = np.array([0, 1, 2, 3, 4, 5, 6, 0])


def some_scores(nets: int) -> list[np.ndarray]:
    """Return each net's probabilities of seven classes for eight images, float32."""
    generator = np.random.default_rng(0)
    return list(generator.dirichlet(np.ones(7), (nets, len(LABELS))).astype(np.float32))


def counted(scores: np.ndarray, best: int) -> float:
    ranked = np.argsort(-scores, axis=1)[:, :best]
    return 100 * float(np.mean([label not in row for label, row in zip(LABELS, ranked, strict=True)]))


def test_errors_match_a_count_by_hand():
    for scores in some_scores(4):
        top1, top5 = 100 * errors(scores, LABELS).mean(1)
        assert (top1, top5) == pytest.approx((counted(scores, 1), counted(scores, 5)))


def test_a_mean_may_be_weighted():
    a, b, c = some_scores(3)
    np.testing.assert_allclose(average([a, b, c]), (a + b + c) / 3, rtol=1e-6)
    np.testing.assert_allclose(average([a, b, c], [1, 1, 2]), (a + b + 2 * c) / 4, rtol=1e-6)


def test_seven_nets_give_the_rows_of_the_papers_table_2():
    scores, stars = some_scores(7), [False] * 5 + [True] * 2
    single, star, five, seven, weighted = rows(scores, stars, LABELS, [1, 1, 1, 1, 1, 2, 2])
    assert [row.system for row in (single, star, five, seven)] == [ONE, ONE_STAR, "5 CNNs", "7 CNNs*"]
    assert single.values(TOP1) == pytest.approx([counted(net, 1) for net in scores[:5]])
    assert star.values(TOP5) == pytest.approx([counted(net, 5) for net in scores[5:]])
    assert five.values(TOP1) == pytest.approx([counted(sum(scores[:5]), 1)])
    assert seven.values(TOP1) == pytest.approx([counted(sum(scores), 1)])
    assert weighted.values(TOP1) == pytest.approx([counted(sum(scores) + scores[5] + scores[6], 1)])
    assert five.published == pytest.approx({TOP1: -2.6, TOP5: -1.8})
    assert seven.published == pytest.approx({TOP1: -4.0, TOP5: -2.8})
    assert {row.than for row in (five, seven, weighted)} == {ONE}


@pytest.mark.parametrize("stars", [[False] * 4 + [True] * 3, [True] * 7])
def test_seven_other_nets_have_no_published_average(stars):
    seven = rows(some_scores(7), stars, LABELS, None)[-1]
    assert seven.system == "7 CNNs*"
    assert not seven.published


def test_without_a_sixth_convolution_there_is_one_average():
    assert [row.system for row in rows(some_scores(3), [False] * 3, LABELS, None)] == [ONE, "3 CNNs"]
