"""Damaged files in the output folder of an experiment."""

import json

import numpy as np
import pytest
import torch

from tools.experiments.kept import reading
from tools.experiments.record import RecordError


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 garbage"])
@pytest.mark.parametrize("load", [np.load, torch.load, lambda path: json.loads(path.read_text())])
def test_a_damaged_file_of_an_experiment_is_named_with_what_to_do(content, load, tmp_path):
    path = tmp_path / "tanh-0.pt"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"tanh-0.pt is damaged \(.+\): delete it and run"), reading(path):
        load(path)


def test_a_lack_of_memory_is_not_damage(tmp_path):
    with pytest.raises(MemoryError), reading(tmp_path / "tanh-0.pt"):
        raise MemoryError


def test_a_file_of_an_experiment_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError), reading(tmp_path / "missing"):
        np.load(tmp_path / "missing")
