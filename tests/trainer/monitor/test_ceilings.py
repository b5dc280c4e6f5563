"""The work that is timed to measure the ceilings."""

import itertools

import pytest
import torch

from pipeline.loader import Decoding
from trainer.monitor import ceilings
from trainer.setting_sources import load_settings


def test_rate_is_images_over_seconds(monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 1.0, 2.0, 2.0])  # start of device and host, three checks of the time, end
    monkeypatch.setattr(ceilings.time, "monotonic", lambda: next(clock))
    assert ceilings.measure_throughput(lambda: 30, seconds=2.0, device=torch.device("cpu")) == 30.0


def test_the_loaders_work_takes_batches():
    batches = ((torch.zeros(1), torch.zeros(n)) for n in itertools.count(1))
    work = ceilings.loader_work(batches)
    assert [work(), work()] == [1, 2]


@pytest.mark.parametrize("preset", ["paper", "code2012"])
def test_the_models_work_can_be_repeated_without_limit(preset):
    settings = load_settings(["--crop", "67", "--width", "0.25", "--preset", preset])
    work = ceilings.model_work(settings, 10, Decoding(crop=67), images=4, precision="fp32")
    assert [work() for _ in range(5)] == [4] * 5
