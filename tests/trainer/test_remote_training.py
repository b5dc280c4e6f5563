"""Training on a dataset behind a URL gives the losses of the local one, and refuses what cannot work."""

import json

import pytest

from tests.bucket import serving
from tests.helpers import command, exact, main


@pytest.fixture
def bucket(packed):
    with serving(packed) as bucket:
        yield bucket


def test_losses_are_those_of_the_local_run(bucket, whole, tmp_path, monkeypatch):
    cache = ("--cache", str(tmp_path / "cache"), "--cache-size", "1GB")
    assert main(monkeypatch, command(bucket.url, tmp_path / "run", *cache)) == 0
    assert exact(tmp_path / "run" / "metrics.csv") == exact(whole / "metrics.csv")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"] == bucket.url


def test_a_run_can_be_evaluated_on_a_copy_behind_a_url(bucket, whole, tmp_path, monkeypatch, capsys):
    results = []
    for data in (bucket.url, str(bucket.root)):
        capsys.readouterr()
        cache = ("--cache", str(tmp_path / "cache"))
        assert main(monkeypatch, ["", "-m", "evaluate", str(whole), "--data", data, *cache]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["--cache-size", "many"], "--cache-size many: input should be a size, such as 200GB or 512MiB"),
        (["--cache-size", "100KB"], "use a larger --cache-size, or a --shuffle-window"),
        (["--cache-size", "100KB", "--shuffle-window", "1"], "or a smaller --shuffle-window"),
    ],
)
def test_a_cache_that_cannot_work_is_refused_in_one_line(
    bucket, tmp_path, monkeypatch, capsys, settings, line
):
    arguments = command(bucket.url, tmp_path / "run", "--cache", str(tmp_path / "cache"), *settings)
    assert main(monkeypatch, arguments) in (1, 2)
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_missing_dataset_is_one_line_without_the_password(bucket, tmp_path, monkeypatch, capsys):
    url = bucket.url.replace("http://", "http://me:secret@") + "/nowhere"
    assert main(monkeypatch, command(url, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "/data/nowhere/dataset.json does not exist" in error
    assert error.count("\n") == 1
    assert "secret" not in error
