"""The dataset's storage becomes unavailable while a run trains or evaluates, and then comes back."""

import errno
import itertools
import os

import pytest

from pipeline.reader import ShardReader
from tests.helpers import command, exact, main, rows


@pytest.mark.usefixtures("_larger_than_memory")
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_run_saves_and_ends_and_the_same_command_continues_it(
    packed, whole, tmp_path, monkeypatch, capsys, split
):
    out, preadv = tmp_path / "run", os.preadv
    read, calls = ShardReader.read, {"train": 0, "val": 0}

    def goes_away(reader: ShardReader, numbers):
        calls[reader.split.index.partition(".")[0]] += 1
        if calls[split] == {"train": 8, "val": 2}[split]:
            monkeypatch.setattr(os, "preadv", stale)
        return read(reader, numbers)

    def stale(*_: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(ShardReader, "read", goes_away)
    assert main(monkeypatch, command(packed, out, "--evaluation-batch", "12")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "retrying for" not in line]
    assert f"{packed}/{split}-00000" in line
    assert "cannot be read: Stale file handle. Run the same command again" in line
    assert rows(out / "metrics.csv")
    assert [path.name[:4] for path in (out / "checkpoints").iterdir()]

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(ShardReader, "read", read)
    assert main(monkeypatch, command(packed, out, "--evaluation-batch", "12")) == 0
    assert "continuing" in capsys.readouterr().out
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_an_error_of_the_system_while_a_batch_is_read_saves_the_state_too(
    packed, whole, tmp_path, monkeypatch, capsys
):
    out, read, calls = tmp_path / "run", ShardReader.read, itertools.count()

    def fails(reader: ShardReader, numbers):
        if next(calls) == 8:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a shard")
        return read(reader, numbers)

    monkeypatch.setattr(ShardReader, "read", fails)
    assert main(monkeypatch, command(packed, out)) == 1
    assert "a shard: Too many open files" in capsys.readouterr().err
    saved = max(int(path.stem[5:]) for path in (out / "checkpoints").iterdir())
    assert saved == int(rows(out / "metrics.csv")[-1]["step"]) > 0
    monkeypatch.setattr(ShardReader, "read", read)
    assert main(monkeypatch, command(packed, out)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
