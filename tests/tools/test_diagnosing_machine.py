"""What the doctor asks of the machine, without waiting forever, on imitated machines."""

import os
import time
from pathlib import Path

import pytest

from tools.diagnosing import machine
from tools.diagnosing.findings import Ended, Finding, ask, rows, run_program, size
from trainer.settings import Settings, SettingsError


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_probe_that_hangs_is_a_problem_and_does_not_hang_the_doctor():
    [found] = ask("disk", lambda: time.sleep(60) or [], seconds=0.05)
    assert (found.subject, found.status) == ("disk", "problem")
    assert "no answer within 0.05 s" in found.text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SettingsError("port 1 is in use: choose another"), "port 1 is in use: choose another"),
        (OSError(5, "Input/output error", "/data/x"), "/data/x: Input/output error"),
    ],
)
def test_what_training_would_refuse_is_a_problem(error, text):
    def refuse():
        yield Finding("a", "kept?")
        raise error

    assert [(each.text, each.status) for each in ask("a", refuse)] == [(text, "problem")]


def test_other_errors_of_a_probe_are_raised():
    with pytest.raises(ZeroDivisionError):
        ask("a", lambda: [1 // 0])


def test_a_program_is_killed_with_its_children_after_its_time():
    begun = time.monotonic()
    ended = run_program(["sh", "-c", "trap '' TERM; echo said; sleep 60 & sleep 60"], 2.0)
    assert (ended.code, ended.output) == (None, "said\n")
    assert time.monotonic() - begun < 20


def test_a_program_gives_its_code_output_and_errors():
    assert run_program(["sh", "-c", "echo a; echo b >&2; exit 3"], 60) == Ended(3, "a\n", "b\n")


def test_a_finding_is_shown_with_its_mark_and_below_it_what_to_do(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    head, more, arrow = rows(Finding("disk", "slow " * 12, "problem", "use another"))
    assert head.startswith("✗ disk          slow")
    assert more.startswith(" " * 16 + "slow")
    assert arrow == " " * 16 + "→ use another"


def test_a_command_is_not_broken_at_its_hyphens(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in range(12):
        finding = Finding(
            "dataset", "none", "problem", "now " * words + "alexnet-train make-shards --val-fraction 0.1"
        )
        text = "\n".join(rows(finding)).split()
        assert {"alexnet-train", "make-shards", "--val-fraction"} <= set(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1 kB"), (18_370_560, "18.4 MB"), (25.3e9, "25.3 GB"), (4e15, "4e+03 TB")],
)
def test_sizes_have_three_digits_and_a_unit(count, text):
    assert size(count) == text


CPUINFO = "model name : A\nflags : fpu avx2 avx512f avx512_bf16\n"
PRESSURE = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def test_a_busy_processor_and_a_limit_on_threads_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    files = {"proc/cpuinfo": CPUINFO, "proc/pressure/cpu": PRESSURE.format("63.00")}
    files |= {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000"}
    found = by_subject(machine.processor(write(tmp_path, files)))
    assert "4 of 8 cores, by quota; AVX2, AVX-512, bf16" in found["CPU"].text
    assert "63% of the last 10 s" in found["load"].text
    assert "off 3 of 4 cores" in found["threads"].text
    assert {found[name].status for name in ("load", "threads")} == {"note"}


def test_an_idle_processor_is_not_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = machine.processor(write(tmp_path, {"proc/pressure/cpu": PRESSURE.format("3.00")}))
    assert [each.subject for each in found] == ["CPU", "versions"]


def test_free_memory_is_limited_by_the_control_group(tmp_path):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 3000 kB\n"}
    assert machine.free_memory(write(tmp_path, files)) == 3000 * 1024
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000000"}
    assert machine.free_memory(write(tmp_path, files)) == 1_000_000


H200 = {"name": "NVIDIA H200", "bytes": 150e9, "used": 1e9, "jpeg_engine": 0}
DRIVER = {"driver": "580.65", "cuda": 13000, "gpus": [H200]}
MISSING = {"error": "NVML Shared Library Not Found"}
CPU_ONLY = {"cuda": None, "precision": "fp32", "kernels": True, "gpus": 0, "nvml": MISSING}
WITH_GPU = CPU_ONLY | {"cuda": "13.0", "precision": "bf16", "gpus": 1, "nvml": DRIVER}
GPUS = {
    "none": (CPU_ONLY, [], {}, ("GPU", "ok", "none", "")),
    "without a driver": (CPU_ONLY, ["0x030200"], {}, ("GPU", "note", "1 of NVIDIA, but no driver", "580")),
    "required without a driver": (
        CPU_ONLY,
        ["0x030200"],
        {"device": "cuda"},
        ("GPU", "problem", "1 of", "580"),
    ),
    "another device of NVIDIA": (CPU_ONLY, ["0x020000"], {}, ("GPU", "ok", "none", "")),
    "not wanted": (CPU_ONLY | {"nvml": {}}, ["0x030200"], {"device": "cpu"}, ("GPU", "ok", "not used", "")),
    "in use": (
        WITH_GPU,
        [],
        {},
        ("GPU", "ok", "NVIDIA H200; 1 GB of 150 GB in use; NVML reports a JPEG", ""),
    ),
    "without NVML": (WITH_GPU | {"nvml": MISSING}, [], {}, ("GPU", "note", "1, without metrics", "utility")),
    "old driver": (
        WITH_GPU | {"gpus": 0, "nvml": DRIVER | {"cuda": 12040}},
        [],
        {},
        ("driver", "note", "CUDA up to 12.4; torch needs 13.0", "580"),
    ),
    "torch for CPUs": (CPU_ONLY | {"nvml": DRIVER}, [], {}, ("driver", "note", "no CUDA", "CUDA 13")),
    "hidden": (WITH_GPU | {"gpus": 0}, [], {}, ("driver", "note", "torch finds no GPU", "is '-1'")),
    "emulated bf16": (CPU_ONLY, [], {"precision": "bf16"}, ("precision", "note", "emulates", "--precision")),
    "no kernels": (CPU_ONLY | {"kernels": False}, [], {}, ("kernels", "note", "not built", "compiler")),
}


@pytest.mark.parametrize(("hardware", "devices", "settings", "expected"), GPUS.values(), ids=GPUS)
def test_the_gpu_and_what_is_missing_for_it(tmp_path, monkeypatch, hardware, devices, settings, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    for number, kind in enumerate(devices):
        folder = f"sys/bus/pci/devices/{number}"
        write(tmp_path, {f"{folder}/vendor": "0x10de\n", f"{folder}/class": f"{kind}\n"})
    subject, status, text, remedy = expected
    found = by_subject(machine.accelerator(Settings(**settings), hardware, tmp_path))[subject]
    assert found.status == status
    assert text in found.text
    assert remedy in found.remedy
    assert bool(found.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("ended", "subject", "text"),
    [
        (Ended(None, "", ""), "GPU", "does not answer"),
        (Ended(1, "", "a\nImportError: b\n"), "torch", "ImportError: b"),
    ],
)
def test_a_driver_that_hangs_and_a_torch_that_fails_are_problems(monkeypatch, ended, subject, text):
    monkeypatch.setattr(machine, "run_program", lambda *_: ended)
    hardware, [found] = machine.ask_hardware("auto")
    assert hardware is None
    assert (found.subject, found.status) == (subject, "problem")
    assert text in found.text


DOCKERS = {
    "running": ("echo '{\"runc\":{}}'", 0, "ok", "running"),
    "without NVIDIA's runtime": ("echo '{\"runc\":{}}'", 1, "note", "without NVIDIA's runtime"),
    "with it": ("echo '{\"nvidia\":{}}'", 1, "ok", "with NVIDIA's runtime"),
    "not running": ("echo 'Cannot connect' >&2; exit 1", 1, "ok", "Cannot connect"),
    "hanging": ("sleep 60", 1, "ok", "no answer within 0.3 s"),
}


@pytest.mark.parametrize(("script", "gpus", "status", "text"), DOCKERS.values(), ids=DOCKERS)
def test_docker_and_its_runtime_for_gpus(tmp_path, monkeypatch, script, gpus, status, text):
    path = tmp_path / "docker"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("container", raising=False)
    monkeypatch.setattr(machine, "_DOCKER_SECONDS", 0.3 if script == "sleep 60" else 60.0)
    [found] = machine.docker(gpus)
    assert found.status == status
    assert text in found.text


def test_several_gpus_need_shared_memory(tmp_path):
    [found] = machine.shared_memory(1, tmp_path / "none")
    assert (found.text, found.status) == ("none", "ok")
    [found] = machine.shared_memory(2, tmp_path / "none")
    assert found.status == "problem"
    assert "--shm-size 1g" in found.remedy
