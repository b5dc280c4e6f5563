"""The errors of each image, compared with the trainer's own evaluation, and kept."""

import shutil

import numpy as np
import pytest

from tests.tools.test_figures import begin_run, options
from tools.experiments import crops, predictions
from tools.experiments.finished import Finished, open_run
from tools.experiments.predictions import errors, errors_of, probabilities
from tools.experiments.record import TOP1, TOP5
from trainer.evaluate import evaluate
from trainer.monitor.metrics import Metrics


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    return begin_run(tmp_path_factory.mktemp("runs") / "a", packed)


@pytest.fixture(scope="module")
def opened(folder, tmp_path_factory) -> Finished:
    given = options(crops, tmp_path_factory.mktemp("out"), folder)
    given.run = folder
    return open_run(given, "val")


@pytest.mark.parametrize("count", [1, 10])
def test_errors_are_those_of_an_evaluation_and_computed_once(count, opened, tmp_path, monkeypatch):
    found = errors_of(opened, "val", count, tmp_path)
    batches = opened.trained.batches("val", count, opened.world)
    scores = evaluate(opened.trained.model, opened.precision, batches, opened.world, Metrics())
    opened.trained.model.eval()  # evaluate leaves it in training mode
    assert found.shape == (2, 20)
    assert found.mean(1) == pytest.approx([scores.top1_error, scores.top5_error])
    np.testing.assert_array_equal(errors(*probabilities(opened, "val", count, tmp_path)), found)
    monkeypatch.setattr(predictions, "_batches", None)
    np.testing.assert_array_equal(errors_of(opened, "val", count, tmp_path), found)


def test_ten_crops_are_compared_image_by_image(opened, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "b")
    record = crops.run(options(crops, tmp_path / "out", folder, other), [])
    centre, ten = record.rows
    for number, measure in enumerate((TOP1, TOP5)):
        for row, count in ((centre, 1), (ten, 10)):
            expected = 100.0 * errors_of(opened, "val", count, tmp_path)[number]
            np.testing.assert_array_equal(row.table(measure), np.stack([expected, expected]))
    assert record.result(ten, TOP1).table.shape == (2, 20)
    assert [run.name for run in record.runs] == ["a", "b"]
