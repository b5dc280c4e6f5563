"""A run folder has only one writer."""

import json
import socket
import subprocess
import sys

import pytest

from pipeline.manifest import read_manifest
from pipeline.spec import NET_NAME, NetSpec
from trainer.run import Run, RunError
from trainer.settings import SettingsError, load_settings

HOLDS = """
import sys, time
from pathlib import Path
from pipeline.manifest import read_manifest
from trainer.run import Run
from trainer.settings import load_settings

lock = Run(Path(sys.argv[2])).begin(load_settings([]), read_manifest(Path(sys.argv[1])))
print("begun", flush=True)
time.sleep(600)
"""


def test_a_second_trainer_is_refused_until_the_first_has_ended_even_by_a_crash(packed, tmp_path):
    out = tmp_path / "run"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(packed), str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout.readline() == "begun\n"
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(RunError, match=f"trained by process {held.pid} on {socket.gethostname()}"):
            Run(out).begin(load_settings([]), read_manifest(packed))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    finally:
        held.kill()
        held.wait()
    Run(out).begin(load_settings([]), read_manifest(packed)).close()
    assert Run(out).settings() == load_settings([])


def test_a_start_that_was_killed_before_it_wrote_its_settings_can_be_repeated(packed, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".settings.json.partial").write_text('{"data')
    Run(tmp_path).begin(load_settings([]), read_manifest(packed)).close()
    assert Run(tmp_path).settings() == load_settings([])


def test_a_run_of_an_earlier_version_continues_if_its_meaning_is_unchanged(packed, tmp_path):
    settings, manifest = load_settings([]), read_manifest(packed)
    Run(tmp_path).begin(settings, manifest).close()
    path = tmp_path / "settings.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in held.items() if name != "lrn"}))
    Run(tmp_path).begin(settings, manifest).close()
    with pytest.raises(SettingsError, match=r"differs in lrn \(True there, False here\)"):
        Run(tmp_path).begin(load_settings(["--no-lrn"]), manifest)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([], ": not a JSON object"),
        ({"resolved": "bf16"}, ".resolved: not a JSON object"),
        ({"resolved": None}, ".resolved: not a JSON object"),
        ({"resolved": {"device": "cpu"}}, ".resolved.precision: Field required"),
        ({"resolved": {"device": "cpu", "precision": "fp8"}}, ".resolved.precision: "),
        ({"resolved": {"device": "tpu", "precision": "fp32"}}, ".resolved.device: "),
        (
            {"resolved": {"device": "cpu", "precision": "fp32", "convolutions": "fast"}},
            ".resolved.convolutions: ",
        ),
        (
            {"resolved": {"device": "cpu", "precision": "fp32", "convolutions": None}},
            ".resolved.convolutions: ",
        ),
    ],
)
def test_damaged_settings_are_reported_in_one_line_that_says_what_to_do(packed, tmp_path, content, what):
    settings, manifest = load_settings([]), read_manifest(packed)
    run = Run(tmp_path)
    run.begin(settings, manifest).close()
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content if content else content))
    for use in (
        lambda: run.begin(settings, manifest),
        lambda: run.keep_resolved(settings, {"device": "cpu", "precision": "fp32"}),
        lambda: run.keep_form(lambda: "grouped"),
        run.settings,
    ):
        with pytest.raises(RunError) as refused:
            use()
        assert f"{path} is damaged (settings.json{what}" in str(refused.value)
        assert str(refused.value).endswith(": restore it from a copy")
        assert "\n" not in str(refused.value)


def test_a_run_describes_its_net_without_its_dataset(packed, tmp_path):
    settings, manifest = (
        load_settings(["--data", str(tmp_path / "gone"), "--crop", "64"]),
        read_manifest(packed),
    )
    run = Run(tmp_path / "run")
    run.begin(settings, manifest).close()
    net = run.net(settings)
    assert net == NetSpec.from_manifest(manifest, 64)
    assert (net.classes, net.mean, net.size) == (manifest.classes, manifest.pixels.mean, 80)
    path = tmp_path / "run" / NET_NAME
    path.write_text("{}")
    with pytest.raises(RunError, match=r"net.json of .*run is not valid: geometry"):
        run.net(settings)
    path.unlink()  # as in a run of an earlier version
    assert run.net(load_settings(["--data", str(packed), "--crop", "64"])) == net
    with pytest.raises(RunError, match=r"earlier version.*no dataset at .*gone"):
        run.net(settings)
