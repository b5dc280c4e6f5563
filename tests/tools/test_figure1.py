"""Fig. 1: the four-layer net, its images, its training, and the sweep over learning rates."""

import argparse
import io
import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from model.alexnet import count_parameters
from pipeline.machine import cpus
from pipeline.manifest import DatasetError
from tools.experiments import figure1, four_layers
from tools.experiments.figure1 import Sweep, fastest, remarks, rows, table
from tools.experiments.four_layers import Images, Trial, epochs_to, is_over, small_images, train
from tools.experiments.jobs import run_all
from tools.experiments.training import TrainingError


class Reader:
    """A split made of these files."""

    def __init__(self, *jpegs: bytes):
        self.content = jpegs

    def jpeg(self, number: int) -> memoryview:
        return memoryview(self.content[number])

    def location(self, number: int) -> str:
        return f"sample {number}"


def striped(width: int, height: int) -> bytes:
    """A red picture with a blue square in the middle of the longer side."""
    image, side = Image.new("RGB", (width, height), (255, 0, 0)), min(width, height)
    image.paste(
        (0, 0, 255), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def test_small_images_are_the_central_squares():
    reader = Reader(striped(400, 128), striped(128, 400), striped(16, 16))
    images = small_images(reader, np.arange(3))
    assert images.shape == (3, 3, 32, 32)
    assert abs(images[:, :, 2:-2, 2:-2].astype(int) - np.array([0, 0, 255])[:, None, None]).max() < 12
    with pytest.raises(DatasetError, match="sample 0 cannot be decoded"):
        small_images(Reader(b"\xff\xd8 no picture"), np.arange(1))


def test_the_net_has_three_convolutions_and_a_fully_connected_layer():
    net = four_layers.four_layers(10, "relu", 0)
    # 32 of 5×5×3, 32 and 64 of 5×5×32, 10 of 4×4×64, and a bias each.
    assert count_parameters(net) == 32 * 76 + 32 * 801 + 64 * 801 + 10 * 1025
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    tanh = four_layers.four_layers(10, "tanh", 0)
    assert sum(isinstance(layer, torch.nn.Tanh) for layer in tanh) == 3
    deviations = [layer.weight.std().item() for layer in tanh if hasattr(layer, "weight")]
    assert deviations == pytest.approx([0.0001, 0.01, 0.01, 0.01], rel=0.03)


def test_the_epoch_of_the_target_is_interpolated_between_epochs():
    assert epochs_to([0.8, 0.5, 0.3, 0.2], 0.25) == pytest.approx(3.0)  # halfway from 2.5 to 3.5
    assert epochs_to([0.2], 0.25) == 0.5
    assert epochs_to([0.8, 0.5], 0.25) == epochs_to([0.8, math.nan], 0.25) == math.inf
    assert is_over([0.8, 0.25], 0.25)
    assert is_over([math.nan], 0.25)
    assert not is_over([0.26], 0.25)
    assert not is_over([], 0.25)


def test_a_curve_is_given_up_once_a_straight_line_misses_the_deadline():
    def falling(by: float) -> list[float]:
        return [0.6 - by * epoch for epoch in range(6)]

    # At the middle of the sixth epoch, 5.5, the error is .6 - 5·fall and falls on by 10·fall until 15.5.
    assert not is_over(falling(0.024), 0.25, 15.5)  # to .24
    assert is_over(falling(0.023), 0.25, 15.5)  # to .255
    assert is_over(falling(-0.01), 0.25, 15.5)  # it rises
    assert not is_over([0.8] * 5, 0.25, 15.5)  # too short for a line
    assert is_over([0.8] * 5, 0.25, 4.5)  # late
    assert is_over([0.3, 0.28, 0.27, 0.26, 0.26, 0.29], 0.25, 4)
    assert is_over([math.nan], 0.25, 15.5)
    assert is_over([0.2], 0.25, 15.5)


def learnable() -> Images:
    """Images of two classes of noise, dark and bright."""
    labels = np.arange(60) % 2
    pixels = np.random.default_rng(0).integers(0, 156, (60, 3, 32, 32)) + 100 * labels[:, None, None, None]
    return Images(pixels.astype(np.uint8), labels, torch.device("cpu"))


def test_an_interrupted_run_resumes_as_if_uninterrupted(tmp_path):
    images, trial = learnable(), Trial("relu", 0.001, 0)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    errors = train(images, trial, whole, 16, -1, 4)
    assert train(images, trial, halves, 16, -1, 2) == errors[:2]
    assert train(images, trial, halves, 16, -1, 4) == errors
    assert errors[-1] == 0 < errors[0]
    kept = [torch.load(folder / "relu-0.001-0.pt")["net"] for folder in (whole, halves)]
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)


def test_the_time_of_an_interrupted_run_is_added_up(tmp_path, monkeypatch):
    clock = itertools.count(step=60)  # each epoch reads it twice
    monkeypatch.setattr(four_layers.time, "monotonic", lambda: next(clock))
    trial = Trial("relu", 0.001, 0)
    train(learnable(), trial, tmp_path, 16, -1, 1)
    train(learnable(), trial, tmp_path, 16, -1, 3)
    assert trial.minutes(tmp_path) == 3


def test_a_run_of_version_0_1_0_goes_on_without_its_time(tmp_path, monkeypatch):
    images, trial = learnable(), Trial("relu", 0.001, 0)
    errors = train(images, trial, tmp_path, 16, -1, 2)
    state = torch.load(trial.state(tmp_path))
    del state["seconds"]
    torch.save(state, trial.state(tmp_path))
    assert trial.minutes(tmp_path) == 0
    clock = itertools.count(step=60)
    monkeypatch.setattr(four_layers.time, "monotonic", lambda: next(clock))
    assert train(images, trial, tmp_path, 16, -1, 3)[:2] == errors
    assert trial.minutes(tmp_path) == 1


def test_a_run_that_diverges_ends(tmp_path):
    errors = train(learnable(), Trial("relu", 1e20, 0), tmp_path, 16, 0.0, 5)
    assert math.isnan(errors[-1])
    assert len(errors) < 5


def test_learning_rates_that_cannot_win_are_given_up(tmp_path, monkeypatch):
    # The first one is slow, but would be trained to the end if the rates were tried in this order.
    falls = {0.003: [0.8] * 9, 0.1: [math.nan], 0.03: [0.6, 0.4, 0.3, 0.2], 0.01: [0.7, 0.5, 0.2]}

    def learn(_images, _net, optimizer, _batch, draw):
        return falls[optimizer.param_groups[0]["lr"]][draw[1]]

    monkeypatch.setattr(four_layers, "_epoch", learn)
    options = argparse.Namespace(rates=list(falls), epochs=9, target=25.0, batch=128)
    tried = Sweep(options, learnable(), tmp_path).try_rates("relu")
    assert fastest(tried, 25.0) == 0.01
    # One came to 25 % after 2.3 epochs, and the middle of the first one's third epoch is at 2.5.
    assert {rate: len(errors) for rate, errors in tried.items()} == {0.003: 3, 0.1: 1, 0.03: 4, 0.01: 3}
    assert table({"relu": tried}, 25.0).splitlines()[1:] == [
        "|---|---|---|---|---|",
        "| ReLU | 80.0% after 3 | 2.3 epochs | 3.0 epochs | diverged |",
    ]


@pytest.mark.parametrize(
    ("tried", "rate"),
    [
        ({0.1: [0.5, 0.4], 0.01: [0.6, 0.3]}, 0.01),  # neither reaches the target
        ({0.1: [0.3, math.nan], 0.01: [0.5, 0.4]}, 0.1),  # it came closer before it diverged
        ({0.1: [math.nan], 0.01: [math.nan]}, 0.1),
    ],
)
def test_the_rate_that_comes_closest_is_chosen_if_none_reaches_the_target(tried, rate):
    assert fastest(tried, 25.0) == rate


def test_images_arrive_in_another_process_unchanged():
    images = learnable()
    copy = pickle.loads(pickle.dumps(images))
    assert copy.mean == images.mean
    assert copy.classes == images.classes
    numbers = torch.tensor([3, 5])
    assert torch.equal(copy.inputs(numbers), images.inputs(numbers))
    assert copy.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own_which_share_the_cpus():
    assert run_all(pow, (2,), [(3,), (4,)], 1) == [8, 16]
    assert run_all(torch.get_num_threads, (), [(), ()], 2) == [max(1, cpus() // 2)] * 2
    with pytest.raises(TrainingError, match="a worker process ended with exit code 3"):
        run_all(os._exit, (), [(3,)], 2)


def test_the_ratio_compares_runs_with_the_same_seed():
    options = argparse.Namespace(rates=[0.01, 0.1, 1.0], epochs=4, target=25.0)
    curves = {"relu": [[0.2], [0.3, 0.2]], "tanh": [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]}
    found = {row.system: next(iter(row.measured.values())) for row in rows(curves, 25.0, steps=10)}
    assert found["ReLU"] == pytest.approx([5, 10])
    assert found["tanh over ReLU"] == pytest.approx([4, 2])
    assert remarks(curves, {"relu": 0.1, "tanh": 1.0}, options) == [
        "tanh was fastest at 1, an end of the range of learning rates tried: a rate beyond it may be faster."
    ]
    curves["tanh"][1] = [0.5, 0.4]
    assert [row.system for row in rows(curves, 25.0, steps=10)] == ["ReLU"]
    # ReLU reached it after half an epoch and after one.
    assert (
        "tanh did not reach 25 % within 4 epochs on 1 of 2 seeds, 5.3 times as many as ReLU needed."
        in remarks(curves, {"relu": 0.1, "tanh": 0.1}, options)
    )


def test_figure_1_of_a_packed_dataset(packed, tmp_path):
    parser = argparse.ArgumentParser()
    figure1.add_arguments(parser)
    given = f"--data {packed} --classes 2 --epochs 1 --seeds 2 --rates 0.01 0.001 --device cpu".split()
    record = figure1.run(parser.parse_args(given, argparse.Namespace(out=tmp_path)), [])
    assert "12 training images of the first 2 classes" in record.data
    assert [figure.file for figure in record.figures] == ["figure1.png"]
    assert record.remarks[-1].startswith("| epochs to 25 %, seed 0, at a rate of | 0.001 | 0.01 |")
    assert [(run.name, run.seed) for run in record.runs] == [
        *[("relu", 0), ("relu", 0), ("tanh", 0), ("tanh", 0)],
        *[("relu", 1), ("tanh", 1)],
    ]
    assert [run.settings["learning_rate"] for run in record.runs[:4]] == [0.001, 0.01, 0.001, 0.01]
    assert all(run.minutes > 0 for run in record.runs)
    with Image.open(tmp_path / "figure1.png") as image:
        image.load()
