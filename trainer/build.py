"""Build the net and the description of the decoding from settings, for both training and evaluation."""

from dataclasses import fields

import torch

from model.alexnet import AlexNet, Variant
from model.torchvision_alexnet import TorchvisionAlexNet
from pipeline.loader import Decoding
from pipeline.loader_options import make_decoding
from pipeline.machine import cpus
from trainer.memory import keep_freed_memory
from trainer.processes.ranks import read_ranks
from trainer.settings import Settings


def build_model(settings: Settings, classes: int, device: torch.device, form: str = "grouped") -> AlexNet:
    """Build the net on the device, in channels_last format, with initial weights drawn from the seed.

    form: how to compute the convolutions, a key of model.forms.FORMS. Also seeds torch's global generator and
    limits torch's threads to the CPUs that this process may use.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))  # torch ignores CPU quotas
    if device.type == "cpu":
        keep_freed_memory()
    if settings.preset == "torchvision":
        model: AlexNet = TorchvisionAlexNet(classes, settings.dropout)
    else:
        variant = Variant(**{field.name: getattr(settings, field.name) for field in fields(Variant)})
        model = AlexNet(classes, settings.preset, settings.dropout, settings.crop, variant, form)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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
    )
