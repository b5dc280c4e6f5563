"""Build the net and the decoding that settings describe, for both training and evaluation."""

from dataclasses import fields

import torch

from model.alexnet import AlexNet, Variant
from model.torchvision_alexnet import TorchvisionAlexNet
from pipeline.loader import Decoding
from pipeline.machine import cores, cpus
from trainer.memory import keep_freed_memory
from trainer.processes.place import place
from trainer.settings import Settings


def build_model(settings: Settings, classes: int, device: torch.device, form: str = "grouped") -> AlexNet:
    """Build the net on the device, channels_last, with weights drawn from the seed. form: a key of FORMS."""
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
    """Describe how to decode images; by default, with this process's share of the CPUs as threads."""
    threads = settings.threads or max(1, cpus() // processes_here())
    share = Decoding.hw_decoder_load if settings.hw_decoder_load is None else settings.hw_decoder_load
    own = own_cores() if device.type == "cpu" else ()
    return Decoding(
        settings.crop, device, threads, settings.prefetch, share, own if len(own) == threads else ()
    )


def processes_here() -> int:
    """Return the number of the run's processes on this machine, as set by the launcher."""
    return place().local_size


def own_cores() -> tuple[int, ...]:
    """Return this process's share of the cores that it may run on.

    Decoding threads are pinned to them. Otherwise the thread that feeds the decoder would push a decoding
    thread onto the core of another, and the two would share it for some time while a core is idle.
    """
    allowed = cores()
    count = len(allowed) // processes_here()
    first = place().local_rank * count
    return allowed[first : first + count]
