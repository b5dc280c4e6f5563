"""Print what torch and NVML find on this machine, as JSON.

    python -m tools.diagnosing.hardware auto

`alexnet-train doctor` runs this as a program of its own, because a driver that hangs cannot be interrupted.
The argument is the setting --device; with `cpu`, no GPU is touched.
"""

import json
import sys
from typing import Any

import pynvml
import torch

from trainer.precision import resolve_precision


def describe(device: str) -> dict[str, Any]:
    """Return what training would use, and the GPUs as torch and NVML see them."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cuda" if on_gpu else "cpu")
    return {
        "cuda": torch.version.cuda,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "precision": resolve_precision("auto", chosen),
        "threads": torch.get_num_threads(),
        "kernels": _has_kernels(),
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "nvml": {} if device == "cpu" else _nvml(),
    }


def _has_kernels() -> bool:
    """Return whether the kernels in C were built, and can be loaded."""
    try:
        from model import cpu_pool  # noqa: F401
        from pipeline import cpu_crop  # noqa: F401
    except OSError:
        return False
    return True


def _nvml() -> dict[str, Any]:
    """Return the driver and its GPUs, or the reason why NVML does not answer."""
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": pynvml.nvmlSystemGetCudaDriverVersion(),
            "gpus": [_gpu(handle) for handle in gpus],
        }
    except pynvml.NVMLError as error:
        return {"error": str(error)}


def _gpu(handle: Any) -> dict[str, Any]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        engine = pynvml.nvmlDeviceGetJpgUtilization(handle)[0]
    except pynvml.NVMLError:
        engine = None
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "bytes": memory.total,
        "used": memory.used,
        "jpeg_engine": engine,
    }


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
