"""The gradients of a process among several, and how they are exchanged."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.forms import FORMS
from trainer.learner import Learner
from trainer.processes.distributed import World
from trainer.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture
def sent(monkeypatch) -> list[Tensor]:
    """Record what is summed over processes. With a single process, the sum is what was sent."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors, all_reduce = [], dist.all_reduce

    def observed(tensor, *arguments, **options):
        tensors.append(tensor.clone())
        return all_reduce(tensor, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", observed)
    yield tensors
    dist.destroy_process_group()


def gradients(processes: int, **settings: str) -> list[Tensor]:
    """Return the gradients of a step of a small net in a world of the given size."""
    settings = {"crop": 67, "width": 0.25, "precision": "fp32", **settings}
    learner = Learner(Settings.model_validate(settings), 10, World(0, processes, 0, CPU))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, 67, 67, generator=generator).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(2)  # for dropout
    learner.step(pixels, torch.arange(4))
    return [parameter.grad.clone() for parameter in learner.model.parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_fp32_are_those_of_one_process_bit_for_bit(form, sent, recwarn):
    ours, alone = (gradients(processes, convolutions=form) for processes in (2, 1))
    assert all(map(torch.equal, ours, alone))
    assert not recwarn.list  # torch would warn of strides that do not match the buckets


def test_gradients_in_bf16_are_sent_and_rounded_in_bf16(sent):
    rounded = gradients(2, gradients="bf16")
    assert {tensor.dtype for tensor in sent} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in sent) == sum(gradient.numel() for gradient in rounded)
    exact = gradients(1)
    assert all(map(torch.equal, rounded, [gradient.bfloat16().float() for gradient in exact]))
    assert not any(map(torch.equal, rounded, exact))
