"""Two towers in two processes compared with the grouped net on one device."""

from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet, Variant, count_parameters
from model.towers import Link, Tower, merge, split

CROP, CLASSES, IMAGES = 96, 10, 3  # pool5's maps are 2×2, so their order into fc6 matters
WIDTH = 0.25  # of most nets in these tests, for speed; the exchanged data are proportional to it


class Case(NamedTuple):
    preset: str
    dtype: torch.dtype
    variant: Variant = Variant(width=WIDTH)


OTHER = Variant("tanh", lrn=False, overlapping_pooling=False, width=WIDTH)
RELEASED = Variant(overlapping_pooling=False, released_pooling=True, width=WIDTH)
CASES = {
    "paper in fp64": Case("paper", torch.float64),
    "code2012 in fp64": Case("code2012", torch.float64),
    "paper in fp32, as wide as published": Case("paper", torch.float32, Variant()),
    "variants": Case("paper", torch.float64, OTHER),
    "released pooling": Case("code2012", torch.float64, RELEASED),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # relative to the largest value
EXCHANGES = {"paper in fp64": 6, "code2012 in fp64": 4}  # conv3, fc6, fc7, fc8, and two LRN borders


def grouped_net(case: Case) -> AlexNet:
    torch.manual_seed(0)
    net = AlexNet(CLASSES, case.preset, crop=CROP, variant=case.variant)
    return net.to(case.dtype).to(memory_format=torch.channels_last)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = 255 * torch.rand(IMAGES, 3, CROP, CROP, generator=generator, dtype=case.dtype) - 127.5
    pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
    return pixels, torch.tensor([3, 1, 4])


def pass_through(net: nn.Module, case: Case) -> dict[str, Any]:
    """Return the logits and the gradients of the mean loss."""
    pixels, labels = batch(case)
    logits = net(pixels)
    F.cross_entropy(logits, labels).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"logits": logits.detach(), "gradients": gradients, "pixels": pixels.grad}


class DeafLink(Link):
    """A link that receives nothing in one of the exchanges."""

    def __init__(self, peer: int, deaf_to: int):
        super().__init__(peer)
        self.deaf_to, self.number = deaf_to, count()

    def swap(self, x: Tensor, channels: int) -> Tensor:
        taken = super().swap(x, channels)
        return torch.zeros_like(taken) if next(self.number) == self.deaf_to else taken


def masked(net: nn.Module, case: Case) -> dict[str, Tensor]:
    """Return the logits with dropout, and the masks."""
    masks = {}
    for name in ("drop6", "drop7"):

        def keep(_layer: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            masks[name] = torch.where(inputs[0] == 0, 1, output / inputs[0]).detach()

        net.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        return {"logits": net.train()(batch(case)[0]), **masks}


def run_tower(rank: int, folder: Path) -> None:
    """Write the results of a tower in each case to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        tower = Tower(grouped_net(case), rank).eval()  # in evaluation, dropout halves all units
        found[name] = pass_through(tower, case) | {"sent_bytes": tower.link.sent_bytes}
        found[name]["deaf"] = []
        for number in range(EXCHANGES.get(name, 0)):
            tower.link = DeafLink(1 - rank, number)
            with torch.no_grad():
                found[name]["deaf"].append(tower(batch(case)[0]))
    case = CASES["paper in fp64"]
    tower = Tower(grouped_net(case), rank)
    torch.manual_seed(rank)
    found["dropout"] = masked(tower, case)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of both towers."""
    folder = tmp_path_factory.mktemp("towers")
    mp.spawn(run_tower, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow  # two processes, each of which loads torch
@pytest.mark.parametrize("name", CASES)
def test_two_towers_equal_the_grouped_net_forward_and_backward(name, towers):
    case, (first, second) = CASES[name], (found[name] for found in towers)
    expected = pass_through(grouped_net(case).eval(), case)
    assert distance(first["logits"], expected["logits"]) < TOLERANCE[case.dtype]
    gradients = merge(first["gradients"], second["gradients"])
    assert gradients.keys() == expected["gradients"].keys()
    for parameter, gradient in expected["gradients"].items():
        assert distance(gradients[parameter], gradient) < TOLERANCE[case.dtype], parameter
    assert distance(first["pixels"] + second["pixels"], expected["pixels"]) < TOLERANCE[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXCHANGES)
def test_omitting_any_exchange_changes_the_logits(name, towers):
    first = towers[0][name]
    assert len(first["deaf"]) == EXCHANGES[name]
    for logits in first["deaf"]:
        assert distance(logits, first["logits"]) > 1e3 * TOLERANCE[torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "border"), [("paper in fp64", 2 * 23**2 + 2 * 11**2), ("code2012 in fp64", 0)]
)
def test_only_the_data_that_fig_2_and_the_joint_normalisation_need_are_sent(name, border, towers):
    """Maps are 23, 11, 5 and 2 px wide. Half of fc7 is sent in one direction only, and its gradient back."""
    maps, units = WIDTH * 128 * (5**2 + 2**2), WIDTH * 2048
    values = 2 * (border + maps + units) + units
    assert [found[name]["sent_bytes"] for found in towers] == 2 * [IMAGES * values * 8]


@pytest.mark.slow
def test_each_tower_applies_dropout_to_its_own_half(towers):
    first, second = (found["dropout"] for found in towers)
    masks = {name: torch.cat([first[name], second[name]], 1) for name in ("drop6", "drop7")}
    net = grouped_net(CASES["paper in fp64"])
    for name, mask in masks.items():
        assert 0.4 < mask.mean() < 0.8  # units that are zero anyway count as kept

        def drop(_layer: nn.Module, inputs: tuple[Tensor], _output: Tensor, mask: Tensor = mask) -> Tensor:
            return inputs[0] * mask

        net.get_submodule(name).register_forward_hook(drop)
    with torch.no_grad():
        assert distance(first["logits"], net(batch(CASES["paper in fp64"])[0])) < TOLERANCE[torch.float64]


def test_merging_the_towers_restores_the_net_that_was_split():
    net = grouped_net(CASES["paper in fp32, as wide as published"])
    state = net.state_dict()
    parts = [Tower(net, tower).state_dict() for tower in range(2)]
    merged = merge(*parts)
    assert list(merged) == list(state)
    assert all(torch.equal(merged[name], value) for name, value in state.items())
    assert all(split(state, tower).keys() == parts[tower].keys() for tower in range(2))
    parts[0]["conv1.weight"].zero_()
    assert state["conv1.weight"].all()  # split() returned copies


def test_no_weight_is_in_both_towers():
    with torch.device("meta"):
        net = AlexNet()
    first, second = (count_parameters(Tower(net, tower)) for tower in range(2))
    assert first + second == 60_965_224
    assert first - second == 4_097_000  # fc8


@pytest.mark.parametrize("variant", [Variant(towers=1), Variant(conv6=True), Variant(without="conv3")])
def test_only_the_net_of_fig_2_can_be_split(variant):
    with torch.device("meta"):
        net = AlexNet(variant=variant)
    with pytest.raises(ValueError, match="only a net with two towers and five convolutions"):
        Tower(net, 0)
