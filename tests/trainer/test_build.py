"""The net and the decoding that are built from settings."""

import pytest
import torch

import pipeline.machine
from model.alexnet import Variant
from trainer import build
from trainer.build import build_decoding, build_model, shapes_of
from trainer.processes.ranks import Ranks
from trainer.setting_sources import load_settings

CPU = torch.device("cpu")


def test_the_net_is_the_published_one_unless_settings_change_it():
    assert build_model(load_settings([]), 10, CPU).variant == Variant()
    changed = ["--activation", "tanh", "--no-lrn", "--no-overlapping-pooling", "--towers", "1", "--conv6"]
    changed += ["--without", "conv3", "--width", "0.5", "--released-pooling", "--initial-biases", "zeros"]
    net = build_model(load_settings(changed), 10, CPU)
    expected = Variant(
        "tanh", False, False, 1, True, "conv3", 0.5, released_pooling=True, initial_biases="zeros"
    )
    assert net.variant == expected


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be one of several processes on a machine of eight cores, or with a quota of CPUs."""

    def of(quota: int | None = None, rank: int = 0, processes: int = 1) -> None:
        monkeypatch.setattr(pipeline.machine, "cores", lambda: () if quota else (1, 3, 5, 7, 9, 11, 13, 15))
        monkeypatch.setattr(pipeline.machine, "share_of_cpus", lambda count: (quota or 8) // count)
        monkeypatch.setattr(build, "read_ranks", lambda: Ranks(rank, processes, rank, processes, True))

    return of


def pinned_to(*arguments: str, device: torch.device = CPU) -> tuple[int, ...]:
    return build_decoding(load_settings([*arguments]), device).cores


def test_each_thread_is_pinned_to_a_core_and_processes_use_different_cores(machine):
    machine()
    assert pinned_to() == (1, 3, 5, 7, 9, 11, 13, 15)
    machine(rank=0, processes=2)
    assert pinned_to() == (1, 3, 5, 7)
    machine(rank=1, processes=2)
    assert pinned_to() == (9, 11, 13, 15)


def test_threads_are_not_pinned_on_a_gpu_or_unless_there_is_one_per_core(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pinned_to(device=torch.device("cuda", 0)) == ()
    assert pinned_to("--threads", "3") == ()
    machine(quota=3)
    assert pinned_to() == ()
    machine(processes=16)
    assert pinned_to() == ()


def test_what_a_module_adds_to_its_state_need_not_have_a_shape():
    class Net(torch.nn.Linear):
        def get_extra_state(self) -> dict:
            return {"version": 1}

    assert shapes_of(Net(2, 3).state_dict()) == {"weight": (3, 2), "bias": (3,), "_extra_state": None}
