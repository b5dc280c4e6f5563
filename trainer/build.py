"""Build the net, its loader and the description of the decoding from settings, to train and to evaluate."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from model.alexnet import AlexNet, Variant
from model.bvlc_alexnet import BvlcAlexNet
from model.torchvision_alexnet import TorchvisionAlexNet
from pipeline import Dataset, Loader
from pipeline.loader import Decoding
from pipeline.loader_options import make_decoding
from pipeline.machine import cpus
from trainer.factory import make_net
from trainer.memory import keep_freed_memory
from trainer.processes.ranks import read_ranks
from trainer.setting_groups import ALEXNET
from trainer.settings import Settings

CPU = torch.device("cpu")


def build_model(settings: Settings, classes: int, device: torch.device, form: str = "grouped") -> nn.Module:
    """Build the net on the device, in channels_last format, with initial weights drawn from the seed.

    form: how to compute AlexNet's convolutions, a key of model.forms.FORMS. Also seeds torch's global
    generator and limits torch's threads to the CPUs that this process may use. Raises SettingsError as
    `make_net` does.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))  # torch ignores CPU quotas
    if device.type == "cpu":
        keep_freed_memory()
    if settings.net != ALEXNET:
        model = make_net(settings, classes)
    elif settings.preset == "torchvision":
        model = TorchvisionAlexNet(classes, settings.dropout)
    elif settings.preset == "bvlc":
        model = BvlcAlexNet(classes, settings.dropout, settings.crop)
    else:
        variant = Variant(**{field.name: getattr(settings, field.name) for field in fields(Variant)})
        model = AlexNet(classes, settings.preset, settings.dropout, settings.crop, variant, form)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def last_layer(model: nn.Module, settings: Settings, classes: int) -> set[str]:
    """Return the names of a net's weights whose shape depends on the number of classes."""
    other = shapes_of(build_model(settings, classes + 1, CPU).state_dict())
    return {name for name, shape in shapes_of(model.state_dict()).items() if other[name] != shape}


def shapes_of(state: Mapping[str, Any]) -> dict[str, torch.Size | None]:
    """Return the shape of each value of a state dict. What a module adds to its own may have none."""
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def build_decoding(settings: Settings, device: torch.device) -> Decoding:
    """Return how to decode images. By default, there is a thread for each CPU in this process's share."""
    load = Decoding.hw_decoder_load if settings.hw_decoder_load is None else settings.hw_decoder_load
    return make_decoding(
        settings.crop,
        read_ranks(),
        device=device,
        threads=settings.threads or None,
        prefetch=settings.prefetch,
        hw_decoder_load=load,
        pipelines=settings.pipelines or 1,
    )


def build_loader(settings: Settings, dataset: Dataset, decoding: Decoding, **more: Any) -> Loader:
    """Return the loader of the training images that the settings describe. Raises as `Loader` does.

    more: further arguments of `Loader`, such as `rank`, `world` and `on_damage`.
    """
    return Loader(
        dataset,
        settings.batch,
        seed=settings.seed,
        crops_and_flips=settings.crops_and_flips,
        colour=settings.colour,
        colour_epochs=settings.colour_epochs,
        shuffle_window=settings.shuffle_window,
        crop_chunk=settings.crop_chunk,
        balance=settings.balance,
        **vars(decoding),
        **more,
    )
