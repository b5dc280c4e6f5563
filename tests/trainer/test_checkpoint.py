"""Checkpoints: whole or not there, verified, the newest good one."""

import resource

import pytest
import torch

from trainer.checkpoint import load_newest, save, saved
from trainer.run import RunError

CPU = torch.device("cpu")


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}, "errors": [0.5]}


def test_the_newest_are_kept_and_the_last_is_loaded(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, state(step), keep=2)
    assert [path.name for path in saved(tmp_path)] == ["step-000000010.pt", "step-000000100.pt"]
    loaded, notes = load_newest(tmp_path, CPU)
    assert notes == []
    assert loaded["step"] == 100
    torch.testing.assert_close(loaded["model"]["weight"], torch.full((1000,), 100.0))


def test_no_checkpoint_is_no_error(tmp_path):
    assert load_newest(tmp_path / "none", CPU) == (None, [])


@pytest.mark.parametrize("damage", ["cut short", "empty", "one byte flipped", "not an archive"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step, state(step), keep=2)
    newest = saved(tmp_path)[-1]
    content = bytearray(newest.read_bytes())
    if damage == "one byte flipped":
        place = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 100
        content[place] ^= 1
    changed = {"cut short": content[: len(content) // 2], "empty": b"", "not an archive": b"x" * 1000}
    newest.write_bytes(changed.get(damage, content))
    loaded, notes = load_newest(tmp_path, CPU)
    assert loaded["step"] == 1
    assert len(notes) == 1
    assert str(newest) in notes[0]


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    save(tmp_path, 1, state(1), keep=2)
    saved(tmp_path)[0].write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000000001.pt is damaged.*delete"):
        load_newest(tmp_path, CPU)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    save(tmp_path, 1, state(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the write really fails in mid-file
    try:
        with pytest.raises(RunError, match=r"step-000000002.pt cannot be written: .*same command again"):
            save(tmp_path, 2, state(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert load_newest(tmp_path, CPU)[0]["step"] == 1


def test_loading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"step": 1, "model": Evil()}, tmp_path / "step-000000001.pt")
    with pytest.raises(RunError):
        load_newest(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()
