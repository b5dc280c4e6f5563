"""A net with known outputs, for the tests of classifying."""

import numpy as np
import pytest

from pipeline.manifest import Class
from pipeline.spec import NetSpec
from tools import classify
from tools.classifying.nets import Net

# A net whose logits are the means of red, green and blue, and of a fourth class that is always at 0.
COLOURS = NetSpec(
    geometry="256",
    size=64,
    crop=64,
    mean=(0, 0, 0),
    classes=tuple(
        Class(id=f"n{n}", name=name) for n, name in enumerate(("red, ruby", "green", "blue", "none"))
    ),
)


@pytest.fixture(scope="session")
def colours() -> Net:
    return Net(lambda pixels: np.pad(pixels.mean((2, 3)) / 50, ((0, 0), (0, 1))), COLOURS)


@pytest.fixture
def run_classify(monkeypatch, capsys, colours):
    """Run the command, by default with the net of colours; returns exit code, output and errors."""
    monkeypatch.setattr(classify, "open_export", lambda path: colours)

    def run(*arguments: object, net: tuple = ("--net", "net.onnx")) -> tuple[int | str, str, str]:
        monkeypatch.setattr("sys.argv", ["classify.py", *map(str, (*arguments, *net))])
        with pytest.raises(SystemExit) as stop:
            classify.main()
        return stop.value.code, *capsys.readouterr()

    return run
