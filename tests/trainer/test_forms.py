"""The fastest form of the convolutions is found once, and a run keeps it. The choice itself needs a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.alexnet import AlexNet
from model.forms import FORMS, GROUPS
from pipeline.manifest import read_manifest
from trainer import forms
from trainer.build import build_model
from trainer.forms import fastest, fastest_form, measure, resolve_run_form
from trainer.monitor import ceilings
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import Form, Settings

ALONE = World(0, 1, 0, torch.device("cpu"))
GPU = World(0, 1, 0, torch.device("cuda", 0))
NARROW = {"crop": 67, "width": 0.125, "batch": 4, "precision": "fp32"}
SPEEDS = {  # images/s of an H200
    "grouped": 37_800,
    "towers": 40_200,
    "block-diagonal": 43_100,
    "grouped-s2d": 56_100,
    "towers-s2d": 70_200,
    "block-diagonal-s2d": 66_000,
}


def test_the_setting_offers_the_forms_of_the_net():
    assert get_args(Form) == tuple(FORMS)


def test_groups_are_chosen_with_space_to_depth_and_then_conv1():
    speeds = dict(SPEEDS)
    tried = []

    def images_per_second(form: str) -> float:
        tried.append(form)
        return speeds[form]

    assert fastest(GROUPS, images_per_second) == "towers-s2d"
    assert tried == ["grouped-s2d", "towers-s2d", "block-diagonal-s2d", "towers"]
    speeds["towers"] = 70_300
    assert fastest(GROUPS, images_per_second) == "towers"


def test_a_form_is_measured_with_whole_training_steps(monkeypatch):
    made = []

    def build(*arguments: object) -> AlexNet:
        made.append(build_model(*arguments))
        return made[-1]

    def measure_throughput(work: Callable[[], int], seconds: float, device: torch.device) -> float:
        assert seconds >= 0.5
        before = made[0].conv2.weight.clone()
        images = work()
        assert not torch.equal(before, made[0].conv2.weight)
        return images / 2

    monkeypatch.setattr("trainer.monitor.ceilings.build_model", build)
    monkeypatch.setattr(ceilings, "measure_throughput", measure_throughput)
    assert measure(Settings(**NARROW, convolutions="towers-s2d"), World(0, 2, 0, ALONE.device)) == 1.0
    assert [net.form for net in made] == [FORMS["towers-s2d"]]


def test_a_form_that_fails_is_skipped(monkeypatch):
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ceilings, "model_work", too_large)
    with pytest.warns(UserWarning, match="cannot compute convolutions as block-diagonal: out of memory"):
        assert measure(Settings(**NARROW, convolutions="block-diagonal"), ALONE) == 0.0
    with pytest.raises(torch.OutOfMemoryError):  # because training would fail as well
        measure(Settings(**NARROW, convolutions="grouped"), ALONE)


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[Settings]:
    """Pretend to measure on a GPU whose fastest form is towers-s2d; return what was measured."""
    tried = []

    def measure(settings: Settings, world: World) -> float:
        tried.append(settings)
        return SPEEDS[settings.convolutions]

    monkeypatch.setattr(forms, "measure", measure)
    monkeypatch.setattr(World, "device_name", "a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tried


SAID = "computing convolutions as towers-s2d, the fastest form on this machine"


def test_the_fastest_form_is_remembered(measured, tmp_path):
    settings = Settings(**NARROW)
    assert fastest_form(settings, GPU) == ("towers-s2d", [SAID])
    assert len(measured) == 4
    assert fastest_form(settings, GPU) == ("towers-s2d", [SAID])
    assert len(measured) == 4
    remembered = json.loads((tmp_path / "cache" / "alexnet-train" / "convolutions.json").read_text())
    assert list(remembered.values()) == [{"form": "towers-s2d"}]


@pytest.mark.parametrize(
    "changed",
    [{"preset": "code2012"}, {"width": 0.25}, {"crop": 64}, {"batch": 8}, {"precision": "bf16"},
     {"compile": True}, {"dropout": "off"}, {"lrn": False}],
)  # fmt: skip
def test_another_net_or_batch_is_measured_again(measured, changed):
    settings = Settings(**NARROW)
    fastest_form(settings, GPU)
    fastest_form(settings.model_copy(update=changed), GPU)
    assert len(measured) == 8


def test_another_machine_or_version_is_measured_again(measured, monkeypatch):
    settings = Settings(**NARROW)
    fastest_form(settings, GPU)
    monkeypatch.setattr(World, "device_name", "another GPU")
    fastest_form(settings, GPU)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99999)
    fastest_form(settings, GPU)
    monkeypatch.setattr(forms, "environment", lambda device: {"device": device, "torch": "99"})
    fastest_form(settings, GPU)
    assert len(measured) == 16


def test_each_of_several_processes_has_its_share_of_the_batch(measured):
    settings = Settings(**NARROW)
    fastest_form(settings, GPU)
    fastest_form(settings.model_copy(update={"batch": 8}), World(0, 2, 0, GPU.device))
    assert len(measured) == 4


def test_nothing_is_measured_if_there_is_nothing_to_choose(measured):
    assert fastest_form(Settings(convolutions="towers"), GPU) == ("towers", [])
    assert fastest_form(Settings(preset="torchvision"), GPU) == ("grouped", [])
    assert fastest_form(Settings(preset="code2012", precision="bf16"), ALONE) == ("grouped", [])
    assert fastest_form(Settings(preset="code2012", precision="fp32"), ALONE) == ("towers", [])
    assert fastest_form(Settings(preset="paper", precision="fp32"), ALONE) == ("grouped", [])
    assert not measured
    fastest_form(Settings(towers=1), GPU)
    assert [settings.convolutions for settings in measured] == ["grouped-s2d", "grouped"]


@pytest.mark.parametrize("content", ['{"cut', "[]", "7"])
def test_a_damaged_cache_is_written_again(measured, tmp_path, content):
    path = tmp_path / "cache" / "alexnet-train" / "convolutions.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert fastest_form(Settings(**NARROW), GPU) == ("towers-s2d", [SAID])
    assert list(json.loads(path.read_text()).values()) == [{"form": "towers-s2d"}]


@pytest.mark.parametrize("entry", [None, {}, [], "grouped", {"form": "fast"}, {"form": None}])
def test_a_damaged_entry_is_measured_again(measured, tmp_path, entry):
    fastest_form(Settings(**NARROW), GPU)
    path = tmp_path / "cache" / "alexnet-train" / "convolutions.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), entry)))
    assert fastest_form(Settings(**NARROW), GPU) == ("towers-s2d", [SAID])
    assert list(json.loads(path.read_text()).values()) == [{"form": "towers-s2d"}]


def test_an_unusable_cache_is_reported_and_does_no_harm(measured, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    form, notes = fastest_form(Settings(**NARROW), GPU)
    assert form == "towers-s2d"
    assert notes[1].startswith("measured again at the next start, as this cannot be cached: ")


@pytest.fixture
def begun(packed, tmp_path):
    """Return a function that begins or continues a run on hardware with a given fastest form."""
    manifest = read_manifest(packed)

    def begin(monkeypatch: pytest.MonkeyPatch, fastest: str, *arguments: str) -> str:
        run, settings = Run(tmp_path / "run"), load_settings(list(arguments))
        run.begin(settings, manifest).close()
        run.keep_resolved(settings, {"device": "cpu", "precision": "fp32"})
        found = settings.convolutions if settings.convolutions != "auto" else fastest
        monkeypatch.setattr(forms, "fastest_form", lambda *_: (found, ["found"]))
        settled, _ = resolve_run_form(settings, run, ALONE)
        assert settled.form == settled.convolutions
        return settled.form

    return begin


def recorded(folder: Path) -> dict[str, str]:
    return json.loads((folder / "settings.json").read_text())


def test_a_run_keeps_the_form_that_it_began_with(begun, monkeypatch, tmp_path):
    assert begun(monkeypatch, "towers") == "towers"
    resolved = {"device": "cpu", "precision": "fp32", "convolutions": "towers"}
    assert recorded(tmp_path / "run")["resolved"] == resolved
    assert begun(monkeypatch, "block-diagonal") == "towers"
    assert begun(monkeypatch, "block-diagonal", "--convolutions", "towers") == "towers"
    assert recorded(tmp_path / "run")["resolved"] == resolved


def test_asking_for_another_form_is_refused_as_another_run(begun, monkeypatch):
    begun(monkeypatch, "towers")
    with pytest.raises(ValueError, match=r"differs in convolutions \(towers there, grouped here\)"):
        begun(monkeypatch, "towers", "--convolutions", "grouped")


@pytest.mark.parametrize("lacks", ["convolutions", "everything that auto resolved to"])
def test_a_run_of_an_earlier_version_continues_in_the_form_of_that_version(
    begun, monkeypatch, tmp_path, lacks
):
    begun(monkeypatch, "towers")
    held = recorded(tmp_path / "run")
    del held["convolutions"], held["resolved"]["convolutions"]
    if lacks != "convolutions":
        del held["resolved"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(held))
    assert begun(monkeypatch, "towers") == "grouped"
    with pytest.raises(ValueError, match=r"differs in convolutions \(grouped there, towers here\)"):
        begun(monkeypatch, "towers", "--convolutions", "towers")


def test_the_first_process_decides_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "broadcast", lambda self, value: ("towers", ["as the first says"]))
    settled, notes = resolve_run_form(Settings(), Run(tmp_path), World(1, 2, 1, ALONE.device))
    assert (settled.form, notes) == ("towers", ["as the first says"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("preset", ["paper", "code2012"])
def test_a_gpu_computes_the_same_in_each_form_and_finds_the_fastest(preset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = Settings(**NARROW, preset=preset, dropout="off")
    pixels = 100 * torch.randn(4, 3, 67, 67, device=GPU.device).contiguous(memory_format=torch.channels_last)
    logits = {form: build_model(settings, 10, GPU.device, form)(pixels) for form in FORMS}
    tolerance = 0.01 * float(logits["grouped"].abs().max())  # TF32
    for values in logits.values():
        torch.testing.assert_close(values, logits["grouped"], rtol=0, atol=tolerance)
    form, notes = fastest_form(settings, GPU)
    assert form in FORMS
    assert fastest_form(settings, GPU) == (form, notes)
