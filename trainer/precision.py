"""Resolve the precision `auto` for a device, and make sure that a run keeps its precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings, SettingsError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto` to bf16 where supported: on Ampere or newer GPUs and CPUs with AVX512_BF16 or AMX.

    Other GPUs use fp16. Other CPUs use fp32, because they emulate bf16, which is many times slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def _cpu_computes_bf16() -> bool:
    """Return whether the CPU has bf16 instructions that torch may use.

    AVX-512 alone is not enough: processors had it years before AVX512_BF16. Instructions that
    ATEN_CPU_CAPABILITY forbids torch to use do not count.
    """
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return in_hardware and "AVX512" in torch.backends.cpu.get_cpu_capability()


def resolve_run_precision(settings: Settings, run: Run, world: World) -> Settings:
    """Return the settings with the precision resolved; the first process decides for all.

    The first process records the precision and the device when the run begins, and compares them later.
    Raises SettingsError in all processes if the run began with another precision or device.
    """
    precision, refusal = resolve_precision(settings.precision, world.device), None
    if world.is_main:
        try:
            run.keep_resolved(settings, {"device": world.device.type, "precision": precision})
        except SettingsError as error:
            refusal = str(error)
    precision, refusal = world.broadcast((precision, refusal))
    if refusal is not None:
        raise SettingsError(refusal)
    return settings.model_copy(update={"precision": precision})


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return a context for forward passes in a precision: `bf16`, `fp16` or `fp32`."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def prepare(pixels: Tensor, precision: str) -> Tensor:
    """Convert pixels to fp32 if the model runs in fp32; under autocast, the model converts them itself."""
    return pixels.float() if precision == "fp32" else pixels
