"""The doctor's probes on imitated machines, its arithmetic and its advice."""

import math
import os
import resource
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.dataset import Dataset
from pipeline.files import close_quietly
from pipeline.mixture import read_data
from pipeline.reader import ShardReader
from tools.diagnosing import forecast, machine, preparation, rehearsal
from tools.diagnosing.findings import Ended, Finding, ask, rows, run_program, size
from tools.diagnosing.forecast import Calibration
from tools.diagnosing.preparation import IMAGENET, Data
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ---- Asking


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
    ended = run_program(["sh", "-c", "trap '' TERM; echo said; sleep 60 & sleep 60"], 0.3)
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


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1 kB"), (18_370_560, "18.4 MB"), (25.3e9, "25.3 GB"), (4e15, "4e+03 TB")],
)
def test_sizes_have_three_digits_and_a_unit(count, text):
    assert size(count) == text


# ---- The machine

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
CPU_ONLY = {"cuda": None, "precision": "fp32", "kernel": True, "gpus": 0, "nvml": MISSING}
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
    "no kernel": (CPU_ONLY | {"kernel": False}, [], {}, ("kernel", "note", "not built", "compiler")),
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
    monkeypatch.setattr(machine, "_DOCKER_SECONDS", 0.3)
    [found] = machine.docker(gpus)
    assert found.status == status
    assert text in found.text


def test_several_gpus_need_shared_memory(tmp_path):
    [found] = machine.shared_memory(1, tmp_path / "none")
    assert (found.text, found.status) == ("none", "ok")
    [found] = machine.shared_memory(2, tmp_path / "none")
    assert found.status == "problem"
    assert "--shm-size 1g" in found.remedy


# ---- The run


def test_the_dataset_is_described_and_read_from_its_disk(packed):
    dataset = Dataset(packed)
    data = preparation.measure_data(dataset)
    assert (data.train, data.val, data.stays_in_memory) == (60, 20, True)
    assert data.image_bytes == dataset.reader("train").rows["size"].sum() / 60
    assert data.cold > 0
    found = by_subject(preparation.describe(Settings(data=packed), dataset, data))
    assert "60 training and 20 validation images in 10 classes; shorter side 80 px" in found["dataset"].text
    assert "only in the first epoch" in found["disk"].text
    assert {each.status for each in found.values()} == {"ok"}


def test_images_are_read_from_the_disk_once_for_some_time(packed, monkeypatch):
    reader, read = Dataset(packed).reader("train"), []
    monkeypatch.setattr(
        ShardReader, "read", lambda _, batch: read.append(batch) or reader_read(reader, batch)
    )
    preparation.read_cold(reader)
    assert sorted(number for batch in read for number in batch) == list(range(60))
    read.clear()
    monkeypatch.setattr(preparation, "_BATCH", 10)
    preparation.read_cold(reader, seconds=0)
    assert [len(batch) for batch in read] == [10]


reader_read = ShardReader.read


@pytest.mark.slow
def test_a_cache_smaller_than_a_dataset_in_a_bucket_is_noted(packed_url, tmp_path):
    sizes = {"200GB": "ok", "300kB": "note"}
    for cache_size, status in sizes.items():
        settings = Settings(
            data=packed_url, cache=tmp_path / "cache", cache_size=cache_size, shuffle_window=1
        )
        dataset = Dataset(settings.data, cache=settings.cache_options)
        data = preparation.measure_data(dataset)
        found = by_subject(preparation.describe(settings, dataset, data))
        dataset.storage.close()
        assert (data.train, data.cold) == (60, None)
        assert list(found) == ["dataset", "cache"]
        assert found["cache"].status == status
    assert "--cache-size" in found["cache"].remedy


def test_too_low_a_limit_on_open_files_is_a_problem(packed, monkeypatch):
    dataset, data = Dataset(packed), Data(60, 20)
    dataset.reader("train"), dataset.reader("val")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    found = by_subject(preparation.describe(Settings(data=packed), dataset, data))["open files"]
    assert found.status == "problem"
    assert "all 4 shards" in found.text


@pytest.mark.usefixtures("_larger_than_memory")
def test_a_dataset_larger_than_memory_is_read_in_each_epoch(packed):
    dataset = Dataset(packed)
    found = by_subject(preparation.describe(Settings(data=packed), dataset, Data(60, 20, cold=1e6)))
    assert "delivers 1 MB/s" in found["disk"].text
    assert "in each epoch" in found["disk"].text


def test_a_free_run_folder_one_to_continue_and_those_of_other_runs(packed, tmp_path):
    settings = Settings(data=packed, out=tmp_path / "runs" / "a", crop=67, batch=12)
    [found] = preparation.run_folder(settings, has_data=True)
    assert "is free" in found.text
    lock = Run(settings.run_folder).begin(settings, read_data(packed))
    with pytest.raises(RunError, match="is being trained by process"):
        list(preparation.run_folder(settings, has_data=True))
    close_quietly(lock)
    [found] = preparation.run_folder(settings, has_data=True)
    assert "would be continued" in found.text
    with pytest.raises(SettingsError, match="another run, which differs in batch"):
        list(preparation.run_folder(settings.model_copy(update={"batch": 6}), has_data=True))


def test_a_run_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    [found] = preparation.run_folder(Settings(out=tmp_path / "a" / "b"), has_data=False)
    assert found.status == "problem"
    assert found.text == f"{tmp_path} cannot be written"


@pytest.mark.parametrize(
    ("free", "status", "remedy"),
    [(4e8, "ok", ""), (3.9e8, "problem", "--keep-checkpoints 1"), (2.9e8, "problem", "free the disk")],
)
def test_checkpoints_need_space_for_those_kept_the_best_and_the_next(
    tmp_path, monkeypatch, free, status, remedy
):
    usage = type("usage", (), {"free": int(free)})
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: usage)
    [found] = preparation.space(Settings(out=tmp_path / "run"), checkpoint_bytes=10**8)
    assert found.status == status
    assert remedy in found.remedy


def test_checkpoints_that_are_there_already_need_no_more_space(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: type("usage", (), {"free": 300}))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000000001.pt").write_bytes(bytes(100))
    [found] = preparation.space(Settings(out=tmp_path), checkpoint_bytes=100)
    assert found.status == "ok"


def test_ports_in_use_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = Settings(address="127.0.0.1", port=port)
        with pytest.raises(SettingsError, match=f"port {port} is in use: choose another"):
            list(preparation.ports(taken, 1))
        with pytest.raises(SettingsError, match=f"port {port} is in use"):
            list(preparation.ports(taken.model_copy(update={"port": port - 1}), 2))
    [found] = preparation.ports(taken, 1)
    assert found.text == f"{port}: free"
    [found] = preparation.ports(Settings(port=0), 8)
    assert found.text == "none: --port 0"


# ---- The forecast

MEASURED = Calibration(
    processes=1,
    device="CPU",
    precision="fp32",
    notes=["a note"],
    start_seconds=5.0,
    loader=1000.0,
    net=110.0,
    plain_net=None,
    training=100.0,
    slowest=90.0,
    fastest=105.0,
    step_seconds=1.28,
    verdict="compute-bound",
    evaluation_seconds=2.0,
    checkpoint_bytes=10**8,
    checkpoint_delay=0.5,
    checkpoint_seconds=3.5,
    memory_bytes=2 * 10**9,
    gpu_memory=None,
)
DATA = Data(train=5000, val=400, image_bytes=20_000.0, stays_in_memory=True, cold=5e6)


def test_the_forecast_adds_up_training_evaluations_checkpoints_and_start():
    settings = Settings(epochs=10, evaluate_epochs=3, schedule="cosine")
    found = forecast.forecast(settings, MEASURED, DATA, measured_val=200)
    assert found.evaluation_seconds == 4.0  # 400 images where 200 took 2 s
    assert found.epoch_seconds == 50.0 + 4.0 + 0.5
    assert found.run_seconds == 5.0 + 10 * 50.5 + 4 * 4.0 + 3.0  # and the last checkpoint is waited for


def advised(settings: Settings, measured: Calibration = MEASURED, data: Data = DATA) -> list[str]:
    expected = forecast.forecast(settings, measured, data, measured_val=data.val)
    return [each.subject for each in forecast.advice(settings, measured, expected)]


COSINE = {"schedule": "cosine", "epochs": 20}
ADVICE = {
    "nothing": (COSINE, {}, {}, []),
    "compiling gains nothing": (COSINE, {"plain_net": 116.0}, {}, ["--no-compile"]),
    "compiling gains little": (COSINE, {"plain_net": 115.0}, {}, []),
    # 15 s for the evaluation and 50.5 s for the rest: every third epoch makes it 15 of 166.5 s.
    "long evaluations": (COSINE, {"evaluation_seconds": 15.0}, {}, ["--evaluate-epochs 3"]),
    "long evaluations, but rare": (COSINE | {"evaluate_epochs": 3}, {"evaluation_seconds": 15.0}, {}, []),
    "long evaluations of a short run": (COSINE | {"epochs": 3}, {"evaluation_seconds": 15.0}, {}, []),
    "a schedule that needs them": ({"schedule": "plateau"}, {"evaluation_seconds": 15.0}, {}, []),
    "long epochs": (COSINE, {}, {"train": 180_000}, ["--checkpoint-seconds 600"]),
    "long epochs, saved": (COSINE | {"checkpoint_steps": 500}, {}, {"train": 180_000}, []),
    "long steps": (COSINE, {"step_seconds": 12.0}, {}, ["--log-every 5"]),
    "long steps, logged": (COSINE | {"log_every": 10}, {"step_seconds": 12.0}, {}, []),
}


@pytest.mark.parametrize(("settings", "measured", "data", "expected"), ADVICE.values(), ids=ADVICE)
def test_advice_follows_from_what_was_measured(settings, measured, data, expected):
    assert advised(Settings(**settings), replace(MEASURED, **measured), DATA._replace(**data)) == expected


@pytest.mark.parametrize(
    ("cold", "stays", "status", "text"),
    [
        (2e6, True, "ok", "training reads 2 MB/s"),
        (1e6, True, "note", "the limit in the first epoch"),
        (1e6, False, "note", "the limit in each epoch"),
    ],
)
def test_a_disk_slower_than_training_is_noted(cold, stays, status, text):
    [found] = forecast.disk(MEASURED, DATA._replace(cold=cold, stays_in_memory=stays))
    assert found.status == status
    assert text in found.text


def test_more_memory_than_was_free_is_noted():
    assert not list(forecast.memory(replace(MEASURED, processes=2), 4 * 10**9))
    [found] = forecast.memory(replace(MEASURED, processes=3), 4 * 10**9)
    assert found.text == "training takes 6 GB, and 4 GB were free"


def test_the_figures_are_shown_with_what_they_are_for():
    settings = Settings(epochs=90)
    expected = forecast.forecast(settings, MEASURED, IMAGENET, measured_val=100)
    found = by_subject(
        [*forecast.rates(settings, MEASURED), *forecast.times(settings, MEASURED, expected, IMAGENET)]
    )
    assert found["training"].text == "100 images/s (90 to 105), loader and net together"
    assert found["note"].text == "a note"
    assert found["an epoch"].text.startswith(
        "3 h 50 min for 1,281,167 images of ImageNet, with 16 min 40 s for"
    )
    hours = math.floor((90 * (12811.67 + 1000 + 0.5) + 8) / 3600)
    assert found["the run"].text.startswith(f"{hours} h ")


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ({}, "the net, which shares the cores"),
        ({"loader": 105.0}, "the loader, which shares the cores"),
        ({"processes": 2}, "the net, which shares the cores"),
        ({"processes": 2, "net": 200.0}, "the net, which shares the cores"),
        ({"processes": 2, "net": 300.0}, "the exchange of gradients"),
        ({"net": 300.0}, "the net, which shares the cores"),
        ({"verdict": "storage-bound"}, "the storage"),
        ({"device": "H200"}, "the net: the device computes"),
        ({"device": "H200", "verdict": "input-bound"}, "the loader: the device waits"),
    ],
)
def test_the_limit_is_the_verdict_or_on_a_cpu_what_takes_most_of_the_cores(changed, limit):
    measured = replace(MEASURED, **changed)
    found = by_subject(forecast.rates(Settings(), measured))["limit"].text
    assert found.startswith(limit)
    loader, net = measured.training / measured.loader, measured.training / measured.net
    assert found.endswith(f"loader alone would take {loader:.0%}, and the net alone {net:.0%}")


@pytest.mark.parametrize(
    ("code", "errors", "reason"),
    [
        (1, "a\nno room\n", "no room"),
        (2, "", "exit code 2"),
        (-9, "", "smaller --batch"),
        (137, "", "smaller --batch"),
        (-11, "", "SIGSEGV"),
        (None, "", "did not end in time"),
    ],
)
def test_why_the_measurement_failed(code, errors, reason):
    assert reason in rehearsal._reason(code, errors)
