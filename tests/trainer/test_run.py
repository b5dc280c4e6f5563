"""A run folder has only one writer."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.documents import ContentError
from pipeline.manifest import read_manifest
from pipeline.spec import NET_NAME, NetSpec
from trainer.run import Run, RunError
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

HOLDS = """
import sys, time
from pathlib import Path
from pipeline.manifest import read_manifest
from trainer.run import Run
from trainer.setting_sources import load_settings

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


def test_a_run_of_code2012_before_its_corrections_is_refused_or_continues_as_it_began(packed, tmp_path):
    manifest, code2012 = read_manifest(packed), ["--recipe", "code2012"]
    as_before = [*code2012, "--no-released-pooling", "--crop-chunk=1"]
    as_before += ["--bias-schedule=weights", "--layer-learning-rates="]
    Run(tmp_path).begin(load_settings(as_before), manifest).close()
    path = tmp_path / "settings.json"
    held = json.loads(path.read_text())
    for name in ("released_pooling", "crop_chunk", "bias_schedule"):
        del held[name]  # the earlier version did not know it
    path.write_text(json.dumps(held | {"freeze_conv1_epoch": 72}))  # which was an integer
    with pytest.raises(SettingsError) as refused:
        Run(tmp_path).begin(load_settings(code2012), manifest)
    assert str(refused.value) == (
        f"{tmp_path} already holds another run, which differs in "
        "released_pooling (False there, True here), crop_chunk (1 there, 32 here), "
        "bias_schedule (weights there, constant here), "
        "layer_learning_rates ({} there, {'conv1@67': 0.1} here): "
        "choose another --out, or use that run's settings to continue it"
    )
    Run(tmp_path).begin(load_settings(as_before), manifest).close()
    assert Run(tmp_path).settings() == load_settings(as_before)


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


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"later": 1}, "has the setting 'later', which this version does not know: use the version"),
        ({"epochs": "many"}, "is damaged (settings.json.epochs: "),
        ({"weight_decay": None}, "is damaged (settings.json.weight_decay: "),
        ({"data": 5}, "is damaged (settings.json.data: "),
        ({"data": "a\0b"}, "is damaged (settings.json.data: "),
        ({"dataset": 5}, "is damaged (settings.json.dataset: "),
        ({"data_from_run": 5}, "is damaged (settings.json.data_from_run: "),
        ({"warmup_epochs": 100}, "is damaged (settings.json: "),
    ],
)
def test_settings_of_another_version_or_type_are_refused_in_one_line(packed, tmp_path, change, what):
    run = Run(tmp_path)
    run.begin(load_settings([]), read_manifest(packed)).close()
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for use in (run.settings, lambda: run.begin(load_settings([]), read_manifest(packed))):
        with pytest.raises(RunError) as refused:
            use()
        assert f"{path} {what}" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_an_infinity_that_an_earlier_version_recorded_as_null_does_no_harm(packed, tmp_path):
    run = Run(tmp_path)
    run.begin(load_settings([]), read_manifest(packed)).close()
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stall_seconds": None}))
    assert run.settings() == load_settings([])


def test_a_relative_dataset_is_found_from_any_folder_and_after_both_have_moved(packed, tmp_path, monkeypatch):
    place, moved, elsewhere = tmp_path / "place", tmp_path / "moved", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(packed, place / "shards")
    monkeypatch.chdir(place)
    settings = load_settings(["--data", "shards"])
    Run(Path("runs/a")).begin(settings, read_manifest(settings.data)).close()
    assert json.loads(Path("runs/a/settings.json").read_text())["data"] == "shards"
    monkeypatch.chdir(elsewhere)
    assert read_manifest(Run(place / "runs/a").settings().data)
    place.rename(moved)
    assert read_manifest(Run(moved / "runs/a").settings().data)
    shutil.rmtree(moved / "shards")
    assert Run(moved / "runs/a").settings().data == Path("shards")


def test_a_run_of_an_earlier_version_uses_the_path_that_it_recorded(packed, tmp_path):
    run, settings = Run(tmp_path), load_settings(["--data", "shards"])
    run.begin(settings, read_manifest(packed)).close()
    path = tmp_path / "settings.json"
    held = json.loads(path.read_text())
    del held["data_from_run"]
    path.write_text(json.dumps(held))
    assert run.settings().data == Path("shards")
    run.begin(settings, read_manifest(packed)).close()


def test_names_that_are_not_utf_8_are_kept(packed, tmp_path):
    settings = load_settings(["--data", "caf\udce9", "--out", str(tmp_path / "r\udce9")])
    run = Run(settings.run_folder)
    run.begin(settings, read_manifest(packed)).close()
    assert run.settings() == settings


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"device": "cpu"}', b"null", b"[{]", b"\xff\xfe["])
def test_a_damaged_environment_json_is_named(tmp_path, content):
    (tmp_path / "environment.json").write_bytes(content)
    with pytest.raises(RunError, match=r"environment.json .*: delete it"):
        Run(tmp_path).starts()


HEADER = b"step,epoch,loss,error,images_per_second\r\n"
ROWS = [b"%d,0.5,2.0,0.9,100.0\r\n" % step for step in range(1, 5)]


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", []),
        (bytes(4096), []),
        (HEADER[:12], []),
        (HEADER, []),
        (HEADER + b"".join(ROWS), [1, 2, 3]),
        (HEADER + b"".join(ROWS[:2]) + ROWS[2][:9], [1, 2]),
        (HEADER + b"".join(ROWS[:3]) + bytes(4096), [1, 2, 3]),
        (HEADER + b"".join(ROWS[:3]) + b"\xff\n4,,,,\nnan,1,1,1,1\n", [1, 2, 3]),
    ],
)
def test_what_a_power_cut_leaves_at_the_end_of_a_table_is_dropped(tmp_path, content, steps):
    run = Run(tmp_path)
    run.metrics.path.write_bytes(content)
    run.metrics.truncate(3)
    assert [row["step"] for row in run.metrics.rows()] == steps
    row = {"step": 4, "epoch": 1.0, "loss": 2.0, "error": 0.9, "images_per_second": 9.0}
    run.metrics.append(row)
    assert [row["step"] for row in run.metrics.rows()] == [*steps, 4]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (HEADER + ROWS[0] + bytes(20) + b"\n" + ROWS[2], "line 3"),
        (HEADER + b"1,2\n" + ROWS[1], "line 2"),
        (b"epoch,loss\n", "line 1 names no step"),
        (b"\xff\xfes\0t\0e\0p\0\n\0", "line 1 names no step"),
        (b"step,epoch\n1,2\n", "line 1 names no loss"),
        ("step,epoch\r\n1,2\r\n".encode("utf-16"), "line 1 names no step"),
    ],
)
def test_damage_in_the_middle_of_a_table_is_named_and_nothing_is_changed(tmp_path, content, what):
    run = Run(tmp_path)
    run.metrics.path.write_bytes(content)
    for use in (run.metrics.rows, lambda: run.metrics.truncate(3)):
        with pytest.raises(ContentError, match=rf"metrics.csv is damaged \({what}\): restore it"):
            use()
    assert run.metrics.path.read_bytes() == content
