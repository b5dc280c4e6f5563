"""The candidates of the benchmarks' stages: which they are, what they do, and that they are closed."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from model.forms import FORMS
from pipeline.loader import Dataset
from tools import bench
from tools.benchmarks.stages import _toml

QUICK = ("--runs", "1", "--seconds", "0.1", "--recipe", "demo", "--crop", "67", "--width", "0.125")
QUICK += ("--device", "cpu", "--precision", "fp32")
BATCH = ("--batch", "4")


def test_training_logs_as_in_a_run(packed, monkeypatch, call):
    logged = []
    monkeypatch.setattr(
        "trainer.monitor.journal.Journal.record_interval", lambda self, step, *_: logged.append(step)
    )
    done = call(bench.main, "train", "--data", packed, *QUICK, *BATCH, "--log-every", "2")
    assert done.returncode == 0
    assert logged
    assert logged == list(range(2, logged[-1] + 1, 2))


def test_temporary_folders_are_deleted(packed, tmp_path, monkeypatch, call):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = call(bench.main, "train", "save", "--data", packed, *QUICK, *BATCH, "--trace", tmp_path / "trace")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    done = call(bench.main, "train", "--data", packed, *QUICK, "--sweep", "batch", "2", "4")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_the_chosen_form_of_convolutions_comes_first(packed, call):
    done = call(bench.main, "forms", "--data", packed, *QUICK, *BATCH, "--convolutions", "towers")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    figures = record["images_per_second"]["forms"]
    assert set(figures) == set(FORMS)
    assert next(iter(figures)) == record["convolutions"] == "towers"


def test_a_sweep_opens_its_dataset_once_unless_it_changes(packed, tmp_path, call, monkeypatch):
    from tools.benchmarks import stages

    opened = []
    monkeypatch.setattr(stages, "Dataset", lambda root, **_: opened.append(root) or Dataset(root))
    arguments = ("read", "--data", packed, *QUICK, *BATCH, "--sweep")
    assert call(bench.main, *arguments, "batch", "2", "3").returncode == 0
    assert opened == [packed]
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    assert call(bench.main, *arguments, "data", packed, other).returncode == 0
    assert opened == [packed, packed, other]


def test_processes_of_one_batch_size_end_before_the_next(packed, call, monkeypatch):
    from tools.benchmarks import loader_peers, peer_pipelines

    events = []

    class Peer:
        def __init__(self, python, name, job, seconds):
            self.batch = job.batch
            events.append(("started", job.batch))

        def measure(self):
            return 1.0

        def close(self):
            events.append(("ended", self.batch))

    monkeypatch.setattr(loader_peers, "Peer", Peer)
    monkeypatch.setattr(loader_peers, "rate", lambda *_: 1.0)
    monkeypatch.setattr(peer_pipelines, "PEERS", {"dali": None})
    arguments = ("peers", "--loader-peers", sys.executable, "--data", packed)
    done = call(bench.main, *arguments, *QUICK)
    assert done.returncode == 0, done.stderr
    assert events == [(event, batch) for batch in (32, 128) for event in ("started", "ended")]


@pytest.mark.parametrize("there", [True, False])
def test_the_compiled_stock_net_is_measured_if_there_is_a_compiler(there, packed, call, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable if there else "/nowhere/g++")
    monkeypatch.setattr("tools.benchmarks.stages.Stages._run", lambda self, make: lambda: 1.0)
    done = call(bench.main, "model", "--data", packed, *QUICK, *BATCH)
    figures = json.loads(done.stdout.splitlines()[-1])["images_per_second"]["model"]
    assert list(figures) == ["fp32", "stock NCHW", "stock channels_last", *["stock compiled"] * there]


def test_all_kinds_of_settings_can_be_passed_on_as_toml():
    rates = {"fc8": 10.0, "conv1@5": 0}
    values = {"layer_learning_rates": rates, "drop_epochs": [1.5], "lrn": True, "data": 'a"b'}
    assert tomllib.loads("".join(f"{name} = {_toml(value)}\n" for name, value in values.items())) == values
