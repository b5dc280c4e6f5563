"""A file that cannot be classified is named with the reason, and all others are classified."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO
from tests.nets import write_onnx
from tests.videos import plain, write_video
from tools import classify
from tools.classifying.inputs import find

NAMES = ("a.jpg", "b.png", "c.jpg", "d.mp4", "e.mp4")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures and two videos."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in NAMES:
        if name.endswith("mp4"):
            write_video(folder / name, [plain("red")] * 3)
        else:
            plain("red").save(folder / name)
    return folder


def files_in(output: str) -> list[str]:
    return [Path(line.partition(": ")[0].partition(" 0-")[0]).name for line in output.splitlines()]


def failing(function, name: str, error: BaseException):
    """Wrap the function so that it raises the error if its first argument is or has a path of that name."""

    def instead(first, *arguments, **named):
        path = getattr(first, "path", first)
        if Path(path).name == name:
            raise error
        return function(first, *arguments, **named)

    return instead


ERRORS = [
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    OSError("broken data stream"),
    MemoryError(),
    RecursionError("too deep"),
    ImportError("no codec"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ZeroDivisionError("division by zero"),
    SystemError("unknown opcode\nsecond line"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_after_any_error_of_one_file_the_others_are_classified(
    name, error, folder, run_classify, monkeypatch
):
    from tools.classifying import video

    where = (video, "frames") if name.endswith("mp4") else (classify, "read")
    monkeypatch.setattr(*where, failing(getattr(*where), name, error))
    code, out, errors = run_classify(folder)
    assert code == 1
    assert files_in(out) == [other for other in NAMES if other != name]
    first, last = errors.splitlines()
    assert first.startswith(f"classify: {folder / name}: ")
    assert len(first) > len(f"classify: {folder / name}: ")
    assert last == "classify: 5 files, 1 failed"


@pytest.mark.parametrize("name", ["a.jpg", "d.mp4"])
def test_a_file_whose_copy_cannot_be_written_is_still_classified(name, folder, tmp_path, run_classify):
    drawn = tmp_path / "drawn"
    blocked = drawn / name
    blocked.mkdir(parents=True)
    code, out, errors = run_classify(folder, "--overlay", drawn)
    assert code == 1
    assert files_in(out) == list(NAMES)
    assert name in errors
    assert ": Is a directory" in errors
    assert len(list(drawn.iterdir())) == len(NAMES)


def test_missing_and_empty_inputs_are_named(folder, tmp_path, run_classify):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    code, out, errors = run_classify(
        tmp_path / "none", tmp_path / "empty", folder, tmp_path / "link.jpg", "x" * 300
    )
    assert code == 1
    assert files_in(out) == list(NAMES)
    assert errors.splitlines() == [
        f"classify: {tmp_path}/none: No such file or directory",
        f"classify: no pictures or videos in {tmp_path}/empty (other files: 0)",
        f"classify: {tmp_path}/link.jpg: No such file or directory",
        f"classify: {'x' * 300}: File name too long",
        "classify: 9 files, 4 failed",
    ]
    code, out, errors = run_classify(tmp_path / "none")
    assert (code, out) == (1, "")


def test_pipes_are_skipped_links_followed_and_broken_links_named(folder, run_classify):
    os.mkfifo(folder / "pipe.jpg")  # reading it would wait for ever
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "sub").mkdir()
    plain("red").save(folder / "sub" / "f.jpg")
    (folder / "sub" / "up").symlink_to("..")  # a cycle
    (folder / "zub").symlink_to("sub")
    found, errors, others = find([folder])
    assert [source.name for source in found] == [*NAMES, "gone.jpg", "sub/f.jpg"]
    assert (errors, others) == ([], 1)
    code, _, errors = run_classify(folder)
    assert code == 1
    assert f"classify: {folder}/gone.jpg: No such file or directory" in errors


def test_litter_in_a_folder_is_skipped_but_classified_if_given(folder):
    for name in ("._a.jpg", ".Trash-1000/old.jpg", "@eaDir/a.jpg", "sub/.hidden.mp4"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found, errors, others = find([folder])
    assert [source.name for source in found] == list(NAMES)
    assert (errors, others) == ([], 2)  # files in folders that are litter are not counted
    assert find([folder / "._a.jpg", folder / "@eaDir"])[0] == [
        (folder / "._a.jpg", "._a.jpg"),
        (folder / "@eaDir/a.jpg", "a.jpg"),
    ]


def test_a_folder_that_cannot_be_listed_is_named(folder, run_classify, monkeypatch):
    (folder / "hidden").mkdir()
    denied = PermissionError(errno.EACCES, "Permission denied", folder / "hidden")
    monkeypatch.setattr(os, "scandir", failing(os.scandir, "hidden", denied))
    code, out, errors = run_classify(folder)
    assert code == 1
    assert files_in(out) == list(NAMES)
    assert errors.splitlines()[0] == f"classify: {folder}/hidden: Permission denied"


ODD_NAMES = {
    b"caf\xe9.jpg": "caf\\xe9.jpg",
    b"new\nline.jpg": "new\\nline.jpg",
    b"red\x1b[31m.jpg": "red\\x1b[31m.jpg",
    "größe – 1.jpg".encode(): "größe – 1.jpg",
    b"12:30.mp4": "12:30.mp4",
    b"caf\xe9.mp4": "caf\\xe9.mp4",
    b"50%d.mp4": "50%d.mp4",
}


def test_file_names_of_any_bytes_give_valid_output(tmp_path, run_classify):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ODD_NAMES:
        path = tmp_path / ("whole.mp4" if name.endswith(b"mp4") else "whole.jpg")
        write_video(path, [plain("red")] * 2) if name.endswith(b"mp4") else plain("red").save(path)
        path.rename(folder / os.fsdecode(name))
    code, out, _ = run_classify(folder, "--overlay", tmp_path / "drawn")
    assert code == 0
    assert sorted(files_in(out)) == sorted(ODD_NAMES.values())
    assert len(list((tmp_path / "drawn").iterdir())) == len(ODD_NAMES)
    outputs = [tmp_path / "out.jsonl", tmp_path / "out.csv"]
    for path in outputs:
        assert run_classify(folder, "--out", path)[0] == 0
    rows = [json.loads(line) for line in outputs[0].read_text("utf-8").splitlines()]
    with open(outputs[1], encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    for found in (rows, table):
        names = [row["file"].removeprefix(f"{tmp_path}/in/") for row in found]
        assert sorted(name.replace("\n", "\\n").replace("\x1b", "\\x1b") for name in names) == sorted(
            ODD_NAMES.values()
        )


def test_an_interrupt_ends_without_a_traceback(folder, run_classify, monkeypatch):
    monkeypatch.setattr(classify, "read", failing(classify.read, "b.png", KeyboardInterrupt()))
    assert run_classify(folder)[0] == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "code"),
    [("| cat", 0), ("| true", 141), (">/dev/full", 1), ("2>/dev/full", 0), ("2>&-", 0)],
    ids=["read", "reader gone", "full", "log full", "log closed"],
)
def test_results_are_written_or_the_exit_code_tells(streams, code, folder, tmp_path):
    net = write_onnx(tmp_path / "net.onnx")
    command = f"{sys.executable} -m tools.command classify {folder} --net {net}"
    script = f"export PYTHONIOENCODING=ascii; {command} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 0:
        assert len(done.stdout.splitlines()) == len(NAMES)
