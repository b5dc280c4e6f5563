"""The precision that a run computes in: what `auto` means on a device, and that a run keeps it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings, SettingsError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes with it: an Ampere or newer GPU, or a CPU that has
    AVX512_BF16 or AMX. Elsewhere a CPU emulates bf16, many times slower than fp32, and a GPU has fp16."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def _cpu_computes_bf16() -> bool:
    """AVX-512 alone does not say so: processors had it for years before AVX512_BF16. Instructions that torch
    was told to do without (ATEN_CPU_CAPABILITY) do not count."""
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return in_hardware and "AVX512" in torch.backends.cpu.get_cpu_capability()


def settle(settings: Settings, run: Run, world: World) -> Settings:
    """The settings with the precision resolved. The first process decides, so that all have the same.

    Raises SettingsError, in all processes, where the run began with another precision or device.
    """
    precision, refusal = resolve_precision(settings.precision, world.device), None
    if world.is_main:
        try:
            run.settle(settings, {"device": world.device.type, "precision": precision})
        except SettingsError as error:
            refusal = str(error)
    precision, refusal = world.share((precision, refusal))
    if refusal is not None:
        raise SettingsError(refusal)
    return settings.model_copy(update={"precision": precision})


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a forward pass has its precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def prepare(pixels: Tensor, precision: str) -> Tensor:
    """Pixels as the model takes them: autocast converts what it needs, fp32 has to be asked for."""
    return pixels.float() if precision == "fp32" else pixels
