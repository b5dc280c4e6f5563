"""What `alexnet-train doctor` finds out about the machine, apart from any dataset."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.machine import ROOT, cpus, memory_bytes, text_of
from tools.diagnosing.findings import Finding, Status, run_program, size
from trainer.environment import environment
from trainer.preflight import is_in_container
from trainer.settings import Settings

# Flags of /proc/cpuinfo on x86-64 and on arm64, and what they are called.
_FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_tile": "AMX"}
_FEATURES |= {"asimd": "NEON", "sve": "SVE", "bf16": "bf16"}
_GPU_CLASS, _NVIDIA = "0x03", "0x10de"  # of devices in /sys/bus/pci
_DRIVER = "install NVIDIA's driver for CUDA 13 (580 or newer); start a container with --gpus all"
_BUSY = 0.2  # share of the time in which programs waited for a CPU, from which it is worth knowing
_BUSY_SECONDS = "10"  # of the averages in /proc/pressure
_SHM_BYTES = 1 << 30  # that NCCL needs for several GPUs
_HARDWARE_SECONDS = 90.0  # for importing torch and asking the driver
_DOCKER_SECONDS = 10.0


def processor(root: Path = ROOT) -> Iterator[Finding]:
    """Describe the CPUs, and whether other programs use them. root: the folder that holds /proc and /sys."""
    about, count = environment(""), cpus(root)
    words = text_of(root / "proc/cpuinfo").split()
    features = dict.fromkeys(name for flag, name in _FEATURES.items() if flag in words)
    cores = f"{about['cores']} cores"
    if count < int(about["cores"]):
        cores = f"{count} of {cores}, by quota"
    yield Finding("CPU", "; ".join(filter(None, (about["cpu"], cores, ", ".join(features)))))
    yield Finding(
        "versions",
        ", ".join(f"{name} {about[name]}" for name in about if name not in ("device", "cpu", "cores")),
    )
    some = dict(word.split("=") for word in text_of(root / "proc/pressure/cpu").split("\n")[0].split()[1:])
    waiting = float(some.get(f"avg{_BUSY_SECONDS}", 0)) / 100
    if waiting > _BUSY:
        yield Finding(
            "load",
            f"programs were waiting for a CPU during {waiting:.0%} of the last {_BUSY_SECONDS} s",
            "note",
            "stop other programs: they slow down the measurement, and would slow down the run",
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and 0 < int(threads) < count:
        yield Finding(
            "threads",
            f"OMP_NUM_THREADS={threads} keeps the net off {count - int(threads)} of {count} cores",
            "note",
            "unset OMP_NUM_THREADS",
        )


def memory(root: Path = ROOT) -> Iterator[Finding]:
    """Describe the memory and the limit on open files."""
    yield Finding("memory", f"{size(memory_bytes(root))}, of which {size(free_memory(root))} are free")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard:,}")


def free_memory(root: Path = ROOT) -> int:
    """Return the memory in bytes that a new program may use: what is available on the machine, or less if the
    control group limits it.
    """
    lines = dict(line.split(":", 1) for line in text_of(root / "proc/meminfo").splitlines() if ":" in line)
    available = lines.get("MemAvailable", "").split()
    return min(memory_bytes(root), int(available[0]) * 1024) if available else memory_bytes(root)


def accelerator(settings: Settings, hardware: dict[str, Any], root: Path = ROOT) -> Iterator[Finding]:
    """Describe the GPUs and what training would run on. hardware: what `ask_hardware` returned."""
    nvml, seen = hardware["nvml"], hardware["gpus"]
    on_pci = sum(
        text_of(device / "vendor").startswith(_NVIDIA) and text_of(device / "class").startswith(_GPU_CLASS)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )
    stops: Status = "problem" if settings.device.startswith("cuda") else "note"
    if settings.device == "cpu":
        yield Finding("GPU", "not used: --device cpu")
    elif "error" not in nvml:
        for gpu in nvml["gpus"]:
            engine = "no JPEG engine" if gpu["jpeg_engine"] is None else "a JPEG engine"
            used = f"{size(gpu['used'])} of {size(gpu['bytes'])} in use"
            yield Finding("GPU", f"{gpu['name']}; {used}; NVML reports {engine}")
        yield _driver(hardware, stops)
    elif seen:
        remedy = "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        yield Finding("GPU", f"{seen}, without metrics ({nvml['error']})", "note", remedy)
    elif on_pci:
        yield Finding("GPU", f"{on_pci} of NVIDIA, but no driver ({nvml['error']})", stops, _DRIVER)
    else:
        yield Finding("GPU", "none")
    gpus = f"{seen} GPU{'s' * (seen > 1)}" if seen else "the CPU"
    yield Finding("trains on", f"{gpus}, in {hardware['precision']} unless --precision says otherwise")
    if not seen:
        yield from _cpu_training(settings, hardware)


def _driver(hardware: dict[str, Any], stops: Status) -> Finding:
    """Describe the driver, and why torch finds no GPU. stops: the status if it finds none."""
    version = hardware["nvml"]["cuda"]
    text = f"{hardware['nvml']['driver']}, for CUDA up to {version // 1000}.{version % 1000 // 10}"
    if hardware["cuda"] is None:
        return Finding(
            "driver", f"{text}; this torch has no CUDA", stops, "install torch's build for CUDA 13"
        )
    if version // 1000 < int(hardware["cuda"].partition(".")[0]):
        return Finding("driver", f"{text}; torch needs {hardware['cuda']}", stops, _DRIVER)
    if hardware["gpus"] or not hardware["nvml"]["gpus"]:
        return Finding("driver", text)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = "python -c 'import torch; torch.cuda.init()' says why"
    if visible is not None:
        remedy = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or set it to indices of GPUs"
    return Finding("driver", f"{text}; torch finds no GPU", stops, remedy)


def _cpu_training(settings: Settings, hardware: dict[str, Any]) -> Iterator[Finding]:
    if not hardware["kernels"]:
        yield Finding(
            "kernels",
            "the kernels in C were not built, so the net and the loader are slower",
            "note",
            "install a C compiler, and install this package again",
        )
    if settings.precision == "bf16" and hardware["precision"] != "bf16":
        yield Finding(
            "precision",
            "this CPU emulates bf16, which is many times slower than fp32",
            "note",
            "omit --precision bf16",
        )


def ask_hardware(device: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return what tools/diagnosing/hardware.py prints, or None and the problem. device: the setting."""
    ended = run_program([sys.executable, "-m", f"{__package__}.hardware", device], _HARDWARE_SECONDS)
    if ended.code == 0:
        return json.loads(ended.output), []
    if ended.code is None:
        return None, [
            Finding(
                "GPU",
                f"its driver does not answer within {_HARDWARE_SECONDS:g} s, and training would hang, too",
                "problem",
                "see whether nvidia-smi answers, and restart the machine if not; or add --device cpu",
            )
        ]
    reason = (ended.errors.strip().splitlines() or [f"exit code {ended.code}"])[-1]
    return None, [Finding("torch", f"cannot be used: {reason}", "problem", "install this package again")]


def shared_memory(gpus: int, folder: Path = ROOT / "dev/shm") -> Iterator[Finding]:
    """Describe /dev/shm, which only several GPUs need."""
    if not folder.is_dir():
        free, text = 0, "none"
    else:
        free = shutil.disk_usage(folder).free
        text = f"{size(free)} free"
    if gpus > 1 and free < _SHM_BYTES:
        yield Finding(
            "/dev/shm", f"{text}; {gpus} GPUs need 1 GB", "problem", "start the container with --shm-size 1g"
        )
    else:
        yield Finding("/dev/shm", text)


def docker(gpus: int) -> Iterator[Finding]:
    """Describe Docker, which only the image needs, and whether it can use the GPUs."""
    if is_in_container():
        yield Finding("Docker", "this is a container")
        return
    if shutil.which("docker") is None:
        yield Finding("Docker", "not installed; only the image needs it")
        return
    ended = run_program(["docker", "info", "--format", "{{json .Runtimes}}"], _DOCKER_SECONDS)
    if ended.code != 0:
        lines = ended.errors.strip().splitlines() or [f"no answer within {_DOCKER_SECONDS:g} s"]
        yield Finding("Docker", f"installed, but not running ({lines[-1]}); only the image needs it")
    elif "nvidia" in ended.output or shutil.which("nvidia-container-runtime-hook"):
        yield Finding("Docker", "running, with NVIDIA's runtime")
    elif gpus:
        remedy = "install nvidia-container-toolkit, which docker run --gpus all needs"
        yield Finding("Docker", "running, without NVIDIA's runtime", "note", remedy)
    else:
        yield Finding("Docker", "running")
