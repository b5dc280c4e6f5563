"""Exports compared with their checkpoint, and importing and exporting torchvision's weights."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from model.torchvision_alexnet import INPUT_MEAN, NAMES, SIDE, TorchvisionAlexNet, to_torchvision
from pipeline.manifest import read_manifest
from pipeline.spec import NetSpec
from tools import export, import_weights
from tools.classifying.nets import open_export, open_run
from tools.exporting import formats
from tools.importing import state_dicts
from trainer import checkpoint
from trainer.build import build_model
from trainer.cli import main as alexnet_train
from trainer.run import Run
from trainer.settings import Settings, SettingsError

# A tensor for each name in a state dict of this project's net.
NAMED = {f"{layer}.{kind}": torch.zeros(1, SIDE * SIDE) for layer in NAMES for kind in ("weight", "bias")}
CPU = torch.device("cpu")
FORMS = (".pt2", ".onnx")
# Together these nets have every kind of layer, in each state that matters to evaluation. code2012 has all
# layers of paper, in another order.
NETS = {
    "paper": {"preset": "paper", "dropout": "inverted"},
    "code2012": {"preset": "code2012"},
    "varied": {"lrn": False, "activation": "tanh", "overlapping_pooling": False, "towers": 1}
    | {"conv6": True, "without": "conv3", "dropout": "off"},
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command; return its output, or the message with which it exits."""

    def run(main, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [main.__module__, *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run


def untrained(packed: Path, folder: Path, **settings) -> Run:
    """Make a run of a narrow, untrained net whose enlarged weights give pictures different logits."""
    given = {"data": packed, "out": folder, "crop": 64, "width": 0.125, "device": "cpu", "precision": "fp32"}
    chosen = Settings.model_validate(given | settings)
    run = Run(folder)
    run.begin(chosen, read_manifest(packed)).close()
    model = build_model(chosen, len(read_manifest(packed).classes), CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    checkpoint.write(run.checkpoints, 1, {"step": 1, "model": model.state_dict()}, keep=1)
    return run


@pytest.mark.parametrize(  # the conversion to ONNX takes seconds
    "net", ["paper", *(pytest.param(net, marks=pytest.mark.slow) for net in ("code2012", "varied"))]
)
def test_an_export_computes_what_the_checkpoint_does_for_any_number_of_images(net, packed, tmp_path, command):
    run = untrained(packed, tmp_path / "run", **NETS[net])
    pixels = 60 * torch.randn(7, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    expected = open_run(run.folder).logits(pixels)
    assert expected.std() > 1e-3
    spec, manifest = NetSpec.read(run.folder), read_manifest(packed)
    assert (spec.classes, spec.mean) == (manifest.classes, manifest.pixels.mean)
    assert (spec.size, spec.crop) == (80, 64)
    for form in FORMS if net != "paper" else FORMS[:1]:
        path = tmp_path / f"net{form}"
        assert "logits of 16 validation images" in command(export.main, run.folder, "--out", path)
        opened = open_export(path)
        assert opened.spec == spec
        for count in (1, 7):
            found = opened.logits(pixels[:count])
            assert abs(found - expected[:count]).max() < 1e-4 * abs(expected).max()


def test_an_export_that_computes_something_else_is_deleted(packed, tmp_path, command, monkeypatch):
    run = untrained(packed, tmp_path / "run", lrn=False)
    traced = formats.traced

    def wrong(trained):
        other = deepcopy(trained.model)
        other.fc8.bias.data[0] += 1
        return traced(trained._replace(model=other))

    monkeypatch.setattr(formats, "traced", wrong)
    assert "differ by" in command(export.main, run.folder, "--out", tmp_path / "net.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A file like torchvision's, with ten classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("theirs") / "alexnet.pth"
    torch.save(to_torchvision(TorchvisionAlexNet(10).state_dict()), path)
    return path


@pytest.mark.slow
def test_torchvisions_weights_are_imported_and_exported_unchanged(theirs, packed, tmp_path, command):
    out = tmp_path / "run"
    assert "10 classes" in command(import_weights.main, theirs, "--out", out, "--data", packed)
    spec = NetSpec.read(out)
    assert (spec.mean, spec.size, spec.crop) == (INPUT_MEAN, 256, 224)
    for name in ("back.pth", "back.safetensors"):
        printed = command(export.main, out, "--out", tmp_path / name, "--data", packed)
        assert "equal bit for bit" in printed
    before = state_dicts.read_pth(theirs)
    after = [state_dicts.read_pth(tmp_path / "back.pth")]
    after.append(state_dicts.read_safetensors(tmp_path / "back.safetensors"))
    for name, value in before.items():
        assert all(torch.equal(state[name], value) for state in after)
    refused = command(alexnet_train, "--data", packed, "--out", out, "--preset", "torchvision", "--crop", 80)
    assert refused == "2"  # such a run cannot be trained


def test_weights_and_nets_that_are_not_torchvisions_are_refused(theirs, packed, tmp_path, command):
    run = untrained(packed, tmp_path / "run", lrn=False)
    assert "preset paper is not torchvision's" in command(
        export.main, run.folder, "--out", tmp_path / "net.pth"
    )
    text = tmp_path / "text.pth"
    text.write_text("weights")
    message = command(import_weights.main, text, "--out", tmp_path / "b", "--data", packed)
    assert f"{text} is not a state dict of torchvision's AlexNet" in message
    classes = tmp_path / "classes.txt"
    classes.write_text("n01440764 tench, Tinca tinca\n")
    message = command(import_weights.main, theirs, "--out", tmp_path / "b", "--classes", classes)
    assert f"{theirs} has 10 classes and {classes} has 1" in message
    assert not (tmp_path / "b").exists()
    with pytest.raises(SettingsError, match="is not empty"):
        run.adopt(run.settings(), NetSpec.read(run.folder), "elsewhere")


@pytest.mark.parametrize(
    "state",
    [{}, [1], {"step": 1}, {"step": 1, "model": {}}, {"step": 1, "model": {"fc8.bias": 3}}, "shapes"],
    ids=str,
)
def test_a_checkpoint_of_another_net_is_refused_in_one_line(state, packed, tmp_path, command):
    run = untrained(packed, tmp_path / "run")
    if state == "shapes":
        model = checkpoint.load(run.checkpoints, CPU)[0]["model"]
        state = {"step": 1, "model": {name: value[..., :1] for name, value in model.items()}}
    checkpoint.write(run.checkpoints, 2, state, keep=1)
    message = command(export.main, run.folder, "--out", tmp_path / "net.pt2")
    assert f"the checkpoint in {run.checkpoints} does not match the net in settings.json" in message
    assert "\n" not in message


def test_a_dataset_that_has_moved_can_be_given(packed, tmp_path, command):
    run = untrained(packed, tmp_path / "run")
    message = command(export.main, run.folder, "--out", tmp_path / "net.pt2", "--data", tmp_path / "gone")
    assert message.endswith("If the dataset has moved, give its folder with --data")


OTHER_WEIGHTS = {
    "empty": (b"", "it is empty"),
    "text": (b"weights", "it is damaged, or holds something other than tensors"),
    "zeros": (bytes(1000), "it is damaged"),
    "page": (b"<!DOCTYPE html><html>404</html>", "it is damaged"),
    "a safetensors file cut": (b"\x20\0\0\0\0\0\0\0{", "deserializing header"),
    "dict": ({"a": 1}, "it is not a dict of tensors"),
    "nested": ({"state_dict": {"a": torch.zeros(1)}}, "it is not a dict of tensors"),
    "numbered": ({1: torch.zeros(1)}, "it is not a dict of tensors"),
    "scalars": ({name: torch.tensor(1.0) for name in to_torchvision(NAMED)}, "shape []"),
    "other names": ({"weight": torch.zeros(1)}, "its names differ"),
}


@pytest.mark.parametrize("what", OTHER_WEIGHTS)
@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_files_that_are_not_torchvisions_weights_are_refused_with_the_reason(
    what, extension, packed, tmp_path, command
):
    content, reason = OTHER_WEIGHTS[what]
    path = tmp_path / f"weights.{extension}"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    message = command(import_weights.main, path, "--out", tmp_path / "run", "--data", packed)
    assert f"{path} is not a state dict of torchvision's AlexNet: " in message
    assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_missing_weights_are_named(name, packed, tmp_path, command):
    message = command(import_weights.main, tmp_path / name, "--out", tmp_path / "run", "--data", packed)
    assert f"{tmp_path / name}: No such file or directory" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa one\r\n\r\nb\ttwo words\r\n", [("a", "one"), ("b", "two words")]),
        ("a one\nb stra\u00dfe\n".encode("latin-1"), "not in UTF-8"),
        ("a one\n".encode("utf-16"), "in UTF-16"),
        (b"a one\nb\n", "line 2: it must have an id, white space and a name"),
        (b"a one\na two\n", "line 2: the id a is on an earlier line as well"),
    ],
)
def test_a_list_of_classes_is_read_or_refused_with_the_reason(content, expected, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    if isinstance(expected, list):
        assert [(c.id, c.name) for c in import_weights.read_classes(path)] == expected
        return
    with pytest.raises(SettingsError, match=expected) as refused:
        import_weights.read_classes(path)
    assert str(path) in str(refused.value)
