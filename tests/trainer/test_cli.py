"""Bad input is refused in one line that says what to do, and nothing is lost."""

import errno
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY, command, main
from trainer import checkpoint, cli

ONE_EPOCH = [*TINY, "--epochs", "1", "--port", "0"]


@pytest.fixture
def fail(monkeypatch, capsys):
    """Run the command, which must fail; return its one-line error."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["alexnet-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = capsys.readouterr().err
        assert stop.value.code in (1, 2)
        assert error.count("\n") == 1
        assert error.startswith("alexnet-train: ")
        return error

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data(packed, tmp_path) -> Path:
    """A dataset to damage."""
    return Path(shutil.copytree(packed, tmp_path / "data"))


def test_a_missing_dataset_is_refused_with_the_command_that_packs_one(fail, tmp_path):
    assert "does not exist" in fail("--data", tmp_path / "none", "--out", tmp_path / "run")
    assert "has no dataset.json" in fail("--data", tmp_path, "--out", tmp_path / "run")
    assert "alexnet-train make-shards" in fail("--data", tmp_path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_in_a_container_the_error_says_what_to_mount(fail, tmp_path, monkeypatch):
    monkeypatch.setenv("container", "oci")
    monkeypatch.setenv("ALEXNET_DATA", str(tmp_path / "data"))
    message = fail()
    assert f"-v $PWD/shards:{tmp_path}/data:ro" in message
    assert "docker run alexnet-train demo" in message


def edit_manifest(data: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((data / "dataset.json").read_text())
    change(manifest)
    (data / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format=2, new="thing"), "upgrade alexnet-train"),
        (lambda manifest: manifest["splits"].pop("val"), "no split 'val'"),
    ],
    ids=["newer format", "no validation split"],
)
def test_an_unsuitable_dataset_is_refused(fail, data, tmp_path, change, message):
    edit_manifest(data, change)
    assert message in fail("--data", data, "--out", tmp_path / "run", *ONE_EPOCH)


@pytest.mark.parametrize("damage", ["missing", "shorter", "replaced", "index"])
def test_a_damaged_dataset_is_refused_and_the_file_is_named(fail, data, tmp_path, damage):
    shard = data / "train-000001.tar"
    name = shard.name
    if damage == "missing":
        shard.unlink()
    elif damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1024])
    elif damage == "replaced":
        other = (data / "train-000000.tar").read_bytes()
        shard.write_bytes(other[: shard.stat().st_size].ljust(shard.stat().st_size, b"\0"))
    else:
        name = "train.index.npy"
        shutil.copy(data / "val.index.npy", data / name)
    before = content(data)
    assert name in fail("--data", data, "--out", tmp_path / "run", *ONE_EPOCH)
    assert content(data) == before


def test_an_output_folder_of_another_run_is_not_changed(fail, packed, whole):
    before = content(whole)
    message = fail("--data", packed, "--out", whole, *TINY, "--seed", 5, "--batch", "6")
    assert "seed (0 there, 5 here)" in message
    assert "batch (12 there, 6 here)" in message
    assert content(whole) == before


def test_an_output_folder_with_other_files_is_not_changed(fail, packed, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "choose another --out" in fail("--data", packed, "--out", tmp_path, *ONE_EPOCH)
    assert list(content(tmp_path)) == ["thesis.tex"]


def test_a_run_cannot_be_continued_on_other_data(fail, data, whole):
    edit_manifest(data, lambda manifest: manifest["classes"][0].update(name="another"))
    assert "dataset (" in fail("--data", data, "--out", whole, *TINY)


def test_a_run_cannot_be_continued_where_auto_is_another_precision(fail, packed, tmp_path, monkeypatch):
    """An error of rank 0 reaches the user as one line, and nothing is changed."""
    out, arguments = tmp_path / "run", [*ONE_EPOCH, "--precision", "auto"]
    monkeypatch.setattr("trainer.precision._cpu_computes_bf16", lambda: False)
    assert main(monkeypatch, command(packed, out, *arguments)) == 0
    before = content(out)
    monkeypatch.setattr("trainer.precision._cpu_computes_bf16", lambda: True)
    assert fail("--data", packed, "--out", out, *arguments) == (
        f"alexnet-train: {out} began with precision fp32, and auto is bf16 on this machine: "
        "add --precision fp32 to continue it here, or choose another --out\n"
    )
    assert content(out) == before
    assert main(monkeypatch, command(packed, out, *arguments, "--precision", "fp32")) == 0


def test_an_indivisible_batch_is_refused_with_the_nearest_sizes(fail, packed, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "5", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "use 10 or 15" in fail("--data", packed, "--out", tmp_path / "run", *ONE_EPOCH)


def test_a_crop_larger_than_the_images_is_refused(fail, packed, tmp_path):
    assert "--crop 224" in fail("--data", packed, "--out", tmp_path / "run", "--recipe", "paper")


def test_a_port_in_use_is_refused_with_the_option_to_change(fail, packed, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = ["--address", "127.0.0.1", "--port", port]
        message = fail("--data", packed, "--out", tmp_path / "run", *ONE_EPOCH, *where)
    assert f"port {port} is in use" in message
    assert "--port" in message


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_named(fail, packed, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    message = fail("--data", packed, "--out", tmp_path / "run", *ONE_EPOCH)
    assert re.search(r"step-0000000\d\d.pt cannot be written: No space left.*same command again", message)


def test_a_missing_gpu_is_reported(fail, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = fail("--data", packed, "--out", tmp_path / "run", *ONE_EPOCH, "--device", "cuda")
    assert "--device cuda: torch finds no GPU here" in message


def test_unknown_settings_and_commands_are_refused_with_suggestions(fail):
    assert "did you mean --epochs?" in fail("--epocs", 3)
    assert "did you mean code2012?" in fail("--recipe", "code2013")
    assert "train, evaluate, demo" in fail("trian")


def test_evaluating_a_folder_without_a_run_is_refused(fail, tmp_path):
    assert "no run in" in fail("evaluate", tmp_path)


def test_a_run_can_be_evaluated_without_the_gpu_that_it_recorded(whole, tmp_path, call):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    recorded = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(recorded | {"device": "cuda:9"}))
    evaluated = call(cli.main, "evaluate", out, "--device", "cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout == call(cli.main, "evaluate", whole).stdout  # which recorded the CPU
    refused = call(cli.main, "evaluate", out, "--device", "cuda:x")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--device cuda:x: input should be auto, cuda, cuda:N or cpu" in refused.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory.\nTried")]
)
def test_a_lack_of_memory_is_one_line_with_what_to_do(error, monkeypatch, packed, tmp_path, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.train.train", fail)
    assert main(monkeypatch, command(packed, tmp_path / "run")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"alexnet-train: {type(error).__name__}: {str(error).split()[0]}")
    assert line.endswith("use a smaller --batch or --evaluation-batch, or more GPUs")


def test_other_errors_of_the_program_are_raised(monkeypatch, packed, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("trainer.train.train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(monkeypatch, command(packed, tmp_path / "run"))
