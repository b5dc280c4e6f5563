"""Train the net as two towers on two devices, as in Fig. 2, and compare it with the net on one device.

    alexnet-train paper towers --data shards --steps 100 --batch 128

The two towers run in two processes, and the grouped net in one. Both train from the same weights on the same
batches. The record says how far apart their losses and weights are, how much data the towers exchanged, and
how fast each net was. As a yardstick, the grouped net is trained again with the images of each batch in
reverse order, which only changes the order of sums. The half net with which the paper compares is timed too;
its accuracy is one of the ablations. With two GPUs each tower has one; otherwise two processes share the CPU.

Dropout is off (two processes would draw other masks than one does), no net is compiled, and `auto` precision
means fp32. Any other option is a setting of `alexnet-train train`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, cast

from pipeline.manifest import read_manifest
from tools.experiments.record import Measures, Record, Row
from tools.experiments.training import TrainingError, describe, packing
from tools.options import command_line, count
from trainer.environment import environment
from trainer.setting_groups import ALEXNET
from trainer.setting_sources import load_settings
from trainer.settings import Settings, SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from model.alexnet import AlexNet

    Weights = dict[str, Tensor]

TAKES_SETTINGS = True
ONE, TWO, HALF = "AlexNet on one device", "AlexNet as two towers", "half net on one device"
REVERSED = f"{ONE}, batches reversed"
LOSS = "largest difference of a step's loss from one device's (millionths)"
WEIGHT = "largest difference of a weight from one device's (millionths of its largest change in training)"


class Trained(NamedTuple):
    """The result of training a net: the loss of each step, and the median rate of all steps but the first."""

    losses: list[float]
    images_per_second: float
    parameters: int
    sent_bytes: int = 0  # by one tower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=count,
        default=50,
        metavar="N",
        help="training steps of each net (default 50)",
    )


def run(options: argparse.Namespace, arguments: list[str]) -> Record:
    """Train the nets one after the other; return the record.

    Raises SettingsError for a net without two towers, DatasetError, and TrainingError if a tower fails.
    """
    if options.steps < 2:
        raise SettingsError("--steps must be at least 2, because the first step of a net is not timed")
    settings = comparable(load_settings(arguments))
    manifest = read_manifest(settings.data)
    manifest.split("train")
    import torch

    from model.towers import merge
    from trainer.build import build_model
    from trainer.processes.distributed import join

    settings = settings.model_copy(update={"device": shared_device(settings, torch.cuda.device_count())})
    world, classes = join(settings.device), len(manifest.classes)

    def train_alone(name: str, towers: int = 2) -> tuple[Trained, "Weights"]:
        net = build_model(settings.model_copy(update={"towers": towers}), classes, world.device)
        trained = _train(name, net, settings, options.steps, world.device, reverse=name == REVERSED)
        return trained, net.state_dict()

    one, weights = train_alone(ONE)  # first, because problems with the data then show in this process
    reverse, reverse_weights = train_alone(REVERSED)
    half, _ = train_alone(HALF, towers=1)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        towers = _train_towers(settings, options.steps, Path(folder))
        parts = [torch.load(Path(folder) / f"{tower}.pt", map_location=world.device) for tower in range(2)]
    change = _largest(weights, build_model(settings, classes, world.device).state_dict())

    def away(trained: Trained, others: "Weights") -> Measures:
        loss = max(abs(a - b) for a, b in zip(one.losses, trained.losses, strict=True))
        return {LOSS: [1e6 * loss], WEIGHT: [1e6 * _largest(weights, others) / change]}

    sent = towers[0].sent_bytes / options.steps / settings.batch / 1000
    sent_measure: Measures = {"sent by each tower per image (kB)": [sent]}
    return Record(
        experiment="towers",
        title="Two GPUs",
        source="section 3.2 and Fig. 2; layers-145.cfg",
        data=f"{describe(settings.data)}; {options.steps} steps at a crop of {settings.crop} px and a batch "
        f"of {settings.batch}, preset {settings.preset}, {settings.precision}, without dropout",
        command=command_line(),
        dataset=packing(settings.data),
        environment=environment(world.device_name),
        rows=[
            Row(system=ONE, measured=_measures(one)),
            Row(
                system=TWO,
                measured=_measures(*towers) | sent_measure | away(towers[0], merge(*parts)),
                note="published: 5 to 6 days on two GTX 580s, which is 208 to 250 images/s",
            ),
            Row(system=REVERSED, measured=away(reverse, reverse_weights)),
            Row(system=HALF, measured=_measures(half)),
        ],
        remarks=_remarks(settings, towers[0].images_per_second / half.images_per_second),
    )


def comparable(settings: Settings) -> Settings:
    """Return settings with which the nets compute the same. Raises SettingsError if that is impossible."""
    if settings.net != ALEXNET:
        raise SettingsError(f"--net {settings.net} has no towers: remove it")
    if (settings.towers, settings.conv6, settings.without) != (2, False, "none"):
        raise SettingsError("Fig. 2 shows the net with two towers: remove --towers, --conv6 and --without")
    if settings.precision == "fp16":
        raise SettingsError("--precision fp16: each tower would scale its gradients independently; use bf16")
    precision = "fp32" if settings.precision == "auto" else settings.precision
    return settings.model_copy(update={"dropout": "off", "compile": False, "precision": precision})


def shared_device(settings: Settings, gpus: int) -> str:
    """Return the device of all nets, `cuda` or `cpu`.

    Raises SettingsError if GPUs are requested and there are fewer than two, or if a single one is named.
    """
    if settings.device.startswith("cuda") and (gpus < 2 or ":" in settings.device):
        raise SettingsError(
            f"--device {settings.device}: this needs the first two GPUs, and torch finds {gpus}; without "
            "--device it uses two GPUs if there are two, and otherwise the CPU"
        )
    return "cuda" if settings.device != "cpu" and gpus > 1 else "cpu"


def _train_towers(settings: Settings, steps: int, folder: Path) -> list[Trained]:
    """Train both towers, each in a process of torch's launcher; their weights go to the folder."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        run_id="towers",
        max_restarts=0,
    )
    try:
        results = elastic_launch(config, _train_tower)(settings, steps, folder)
    except ChildFailedError as error:
        tower, _ = error.get_first_failure()
        raise TrainingError(f"the process of tower {tower} failed; torch's message above says why") from None
    return [results[tower] for tower in range(2)]


def _train_tower(settings: Settings, steps: int, folder: Path) -> Trained:
    """Train one tower; runs in each of the two processes."""
    import torch

    from model.towers import Tower
    from trainer.build import build_model
    from trainer.processes import distributed

    world = distributed.join(settings.device)
    if world.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    classes = len(read_manifest(settings.data).classes)
    tower = Tower(cast("AlexNet", build_model(settings, classes, world.device)), world.rank)
    trained = _train(TWO if world.is_main else "", tower, settings, steps, world.device)
    torch.save(tower.state_dict(), folder / f"{world.rank}.pt")
    distributed.leave()
    return trained._replace(sent_bytes=tower.link.sent_bytes)


def _train(
    name: str,
    net: "nn.Module",
    settings: Settings,
    steps: int,
    device: "torch.device",
    reverse: bool = False,
) -> Trained:
    """Train on the first batches of the settings' plan; print progress unless the name is empty.

    reverse: reverse the order of the images in each batch.
    """

    from model.alexnet import count_parameters
    from pipeline import open_dataset
    from trainer.build import build_decoding, build_loader
    from trainer.optim import learning_rate, make_optimizer, set_learning_rate, unscheduled_rate
    from trainer.step import Step

    dataset = open_dataset(settings.data)
    # Each device has a tower, and takes whole batches.
    loader = build_loader(settings, dataset, build_decoding(settings, device), rank=0, world=1)
    optimizer = make_optimizer(net, settings)
    step = Step(net, optimizer, settings.precision, device)
    losses, seconds = [], []
    for number, batch in enumerate(loader.batches(0, steps), 1):
        begun = time.perf_counter()
        epoch = number * loader.batch / loader.samples
        rates = learning_rate(settings, epoch, ()), unscheduled_rate(settings, epoch)
        set_learning_rate(optimizer, rates[0], epoch, rates[1])
        pixels, labels = (part.flip(0) for part in batch) if reverse else batch
        losses.append(step(pixels, labels)[0].item())  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if name and (number % 10 == 0 or number == steps):
            print(f"{name}: step {number}/{steps}, loss {losses[-1]:.4f}", flush=True)
    return Trained(losses, loader.batch / median(seconds[1:]), count_parameters(net))


def _largest(weights: "Weights", others: "Weights") -> float:
    """Return the largest difference of any weight."""
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def _measures(*parts: Trained) -> Measures:
    """Return the measures of a net made of these parts; the first part has the loss."""
    return {
        "parameters (millions)": [sum(part.parameters for part in parts) / 1e6],
        f"loss of step {len(parts[0].losses)}": [parts[0].losses[-1]],
        "images/s": [parts[0].images_per_second],
    }


def _remarks(settings: Settings, ratio: float) -> list[str]:
    """Return remarks for the report. ratio: rate of the towers over that of the half net."""
    import torch

    from model.alexnet import AlexNet, Variant, count_parameters

    with torch.device("meta"):
        published = [count_parameters(AlexNet(variant=Variant(towers=number))) for number in (2, 1)]
    where = "two GPUs" if settings.device == "cuda" else "two processes that share one CPU, not two devices,"
    border = (
        "They also exchange the two channels on either side of the border between them, which the text's "
        "normalisation over all channels needs and Fig. 2 does not show. "
        if settings.preset == "paper" and settings.lrn
        else ""
    )
    return [
        "The two towers and the reversed batches should differ from one device only in the order of sums. "
        "Such rounding grows during training, and jumps where it moves a value across a ReLU's zero, so both "
        "differences should be small but need not be equal.",
        "The towers exchange their maps before conv3 and fc6 and their units before fc7, and the second "
        f"sends its half of fc7 to the first, which has fc8. {border}The gradients, which take the same "
        "paths back, are counted as well.",
        "The paper reports 1.7 and 1.2 points less top-1 and top-5 error than the half net has (see the "
        f"ablations), and slightly less time. On {where} the towers processed {ratio:.2f} times as many "
        f"images/s as the half net on one. For 1000 classes at 224 px, the net has {published[0]:,} "
        f"parameters and the half net {published[1]:,}.",
    ]
