"""Nets that are damaged, of a later version, or different from their net.json are refused with advice."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.spec import NET_NAME
from tests.nets import SPEC, write_onnx
from tools.classifying.nets import NetError, open_export


def write_pt2(path: Path, spec: str | None = json.dumps(SPEC)) -> Path:
    """Write an archive with a net.json but no program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/version", "1")
        if spec is not None:
            archive.writestr(f"net/extra/{NET_NAME}", spec)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(NetError) as refused:
        open_export(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_net_is_opened_whatever_the_case_of_its_extension(tmp_path):
    assert len(open_export(write_onnx(tmp_path / "NET.ONNX")).spec.classes) == 3


@pytest.mark.parametrize("extension", ["onnx", "pt2"])
@pytest.mark.parametrize(
    "content", [b"", b"text", bytes(1000), b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_other_files_are_refused_with_advice(content, extension, tmp_path, capfd):
    path = tmp_path / f"net.{extension}"
    path.write_bytes(content)
    assert refusal(path).endswith(f"Export it again: alexnet-train export RUN --out {path}")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("write", [write_onnx, write_pt2])
def test_a_truncated_net_is_refused_with_advice(write, tmp_path, capfd):
    path = write(tmp_path / f"net.{write.__name__.removeprefix('write_')}")
    path.write_bytes(path.read_bytes()[:-40])
    assert refusal(path).endswith(f"Export it again: alexnet-train export RUN --out {path}")
    assert capfd.readouterr().err == ""


WRONG_SPECS = {
    "later": (json.dumps(SPEC | {"format": 2, "size": "new"}), "upgrade alexnet-train"),
    "absent": (None, "has no net.json"),
    "empty": ("", "is empty"),
    "cut": (json.dumps(SPEC)[:40], "is not valid JSON"),
    "deep": ("[" * 10**5, "is not valid JSON"),
    "list": ("[]", "not a JSON object"),
    "no classes": (json.dumps(SPEC | {"classes": []}), "classes"),
    "mean": (json.dumps(SPEC | {"mean": [math.nan] * 3}), "mean.0"),
    "crop": (json.dumps(SPEC | {"crop": 11}), "crops of 11 pixels do not fit into images of 10"),
    "type": (json.dumps(SPEC | {"size": "big"}), "size"),
}


@pytest.mark.parametrize("write", [write_onnx, write_pt2])
@pytest.mark.parametrize("what", WRONG_SPECS)
def test_a_wrong_description_is_refused(what, write, tmp_path):
    spec, expected = WRONG_SPECS[what]
    path = write(tmp_path / f"net.{write.__name__.removeprefix('write_')}", spec)
    message = refusal(path)
    assert expected in message
    assert "Export it again" in message or what == "later"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classes": SPEC["classes"][:2]}, r"outputs of shape \[3\], but its net.json names 2 classes"),
        ({"classes": SPEC["classes"] * 2}, r"outputs of shape \[3\], but its net.json names 6 classes"),
        ({"crop": 9}, "cannot be used as its net.json says: Got invalid dimensions"),
    ],
)
def test_a_net_that_does_not_match_its_description_is_refused(change, expected, tmp_path):
    with pytest.raises(NetError, match=expected):
        open_export(write_onnx(tmp_path / "net.onnx", json.dumps(SPEC | change)))


def test_a_net_with_two_inputs_is_refused(tmp_path):
    assert "cannot be used" in refusal(write_onnx(tmp_path / "net.onnx", second_input=True))


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    net = open_export(write_onnx(tmp_path / "net.onnx"))
    views = np.zeros((2, 1, 3, 8, 8), np.float32)
    assert net.probabilities(views) == pytest.approx(1 / 3)
    views[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(NetError, match="not finite"):
        net.probabilities(views)
