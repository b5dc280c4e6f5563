"""What settings build."""

import torch

from model.alexnet import Variant
from trainer.build import build_model
from trainer.settings import load_settings


def test_the_net_is_the_published_one_unless_settings_change_it():
    cpu = torch.device("cpu")
    assert build_model(load_settings([]), 10, cpu).variant == Variant()
    changed = ["--activation", "tanh", "--no-lrn", "--no-overlapping-pooling", "--towers", "1", "--conv6"]
    changed += ["--without", "conv3", "--width", "0.5"]
    net = build_model(load_settings(changed), 10, cpu)
    assert net.variant == Variant("tanh", False, False, 1, True, "conv3", 0.5)
