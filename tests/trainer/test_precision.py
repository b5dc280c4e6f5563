"""What `auto` resolves to on different hardware, and that a run keeps its first precision."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.manifest import read_manifest
from trainer.precision import resolve_precision, resolve_run_precision
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import Settings, SettingsError

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "expected"),
    [
        ("AVX2", False, False, "fp32"),
        ("AVX512", False, False, "fp32"),  # Skylake, whose bf16 would be emulated
        ("AVX512", True, False, "bf16"),  # Zen 4
        ("AVX512", True, True, "bf16"),  # Sapphire Rapids
        ("AVX2", True, False, "fp32"),  # with ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", False, False, "fp32"),
    ],
)
def test_auto_on_a_cpu_is_bf16_if_the_hardware_has_it(monkeypatch, capability, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu_is_bf16_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda", 0)) == expected


@pytest.fixture
def begun(packed, tmp_path):
    """Return a function that begins or continues a run on hardware where `auto` has a given meaning."""
    manifest = read_manifest(packed)

    def begin(device: str, precision: str, *arguments: str) -> Run:
        run, settings = Run(tmp_path / "run"), load_settings(list(arguments))
        run.begin(settings, manifest).close()
        resolved = precision if settings.precision == "auto" else settings.precision
        run.keep_resolved(settings, {"device": device, "precision": resolved})
        return run

    return begin


def recorded(run: Run) -> dict[str, str]:
    return json.loads((run.folder / "settings.json").read_text())["resolved"]


def test_the_resolution_of_auto_is_recorded_and_kept(begun):
    assert recorded(begun("cuda", "bf16")) == {"device": "cuda", "precision": "bf16"}
    assert recorded(begun("cuda", "bf16")) == {"device": "cuda", "precision": "bf16"}
    assert begun("cuda", "bf16").settings() == Settings()


@pytest.mark.parametrize(
    ("began", "continued", "message"),
    [
        (("cuda", "bf16"), ("cuda", "fp16"), "began with precision bf16, and auto is fp16 on this machine: "
         "add --precision bf16 to continue it here"),
        (("cpu", "fp32"), ("cpu", "bf16"), "add --precision fp32 to continue"),
        (("cuda", "bf16"), ("cpu", "bf16"), "began with device cuda, and auto is cpu on this machine: "
         "add --device cpu to continue it here"),
        (("cuda", "bf16"), ("cpu", "fp32"), "began with device cuda and precision bf16, and auto is cpu and "
         "fp32 on this machine: add --device cpu --precision bf16 to continue it here"),
    ],
)  # fmt: skip
def test_a_change_on_continuation_is_refused_and_the_suggested_flags_work(begun, began, continued, message):
    begun(*began)
    with pytest.raises(SettingsError) as refused:
        begun(*continued)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    flags = str(refused.value).partition("add ")[2].partition(" to continue")[0].split()
    assert recorded(begun(*continued, *flags)) == dict(zip(("device", "precision"), began, strict=True))


def test_asking_for_another_precision_is_refused_as_another_run(begun):
    begun("cpu", "bf16")
    with pytest.raises(SettingsError, match=r"differs in precision \(bf16 there, fp32 here\)"):
        begun("cpu", "bf16", "--precision", "fp32")


def test_a_run_of_an_earlier_version_records_auto_when_it_is_continued(begun):
    path = begun("cpu", "fp32").folder / "settings.json"
    held = json.loads(path.read_text())
    del held["resolved"]  # earlier versions did not record it
    path.write_text(json.dumps(held))
    assert recorded(begun("cpu", "bf16")) == {"device": "cpu", "precision": "bf16"}
    with pytest.raises(SettingsError, match="--precision bf16 to continue"):
        begun("cpu", "fp32")


def test_the_first_process_decides_for_all(tmp_path: Path, monkeypatch):
    second = World(1, 2, 1, CPU)
    monkeypatch.setattr(World, "broadcast", lambda self, value: ("fp16", None))
    assert resolve_run_precision(Settings(), Run(tmp_path), second).precision == "fp16"
    monkeypatch.setattr(World, "broadcast", lambda self, value: ("fp16", "it began with another"))
    with pytest.raises(SettingsError, match="it began with another"):
        resolve_run_precision(Settings(), Run(tmp_path), second)
    assert not list(tmp_path.iterdir())  # only the first process writes
