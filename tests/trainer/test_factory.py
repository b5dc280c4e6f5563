"""Training, evaluating and using a net of one's own, which --net names."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pipeline.manifest import read_manifest
from tests import small_resnet
from tests.helpers import exact, main, rows, run
from tools import export
from tools.classifying.nets import open_export, open_run
from tools.exporting.formats import read_pth, read_safetensors
from trainer import checkpoint
from trainer.build import build_model
from trainer.cli import main as alexnet_train
from trainer.factory import check_net, make_net
from trainer.initial import with_initial_net
from trainer.learner import Learner
from trainer.optim import make_optimizer, set_learning_rate
from trainer.processes.distributed import World
from trainer.settings import Settings, SettingsError
from trainer.step import Condition

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
RESNET = "tests.small_resnet:ResNet"
TINY = ["--net", RESNET, "--crop", "64", "--batch", "12", "--epochs", "2", "--schedule", "cosine"]
TINY += ["--log-every", "1", "--device", "cpu", "--precision", "fp32", "--colour", "off"]


def command(data: Path, out: Path, *arguments: str) -> list[str]:
    return ["-m", "trainer.cli", "--data", str(data), "--out", str(out), "--port", "0", *TINY, *arguments]


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory) -> Path:
    """A finished run's folder: 10 steps in 2 epochs."""
    out = tmp_path_factory.mktemp("resnet") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert main(patch, command(packed, out)) == 0
    return out


def test_a_run_records_the_factory_and_continues_bit_for_bit(packed, trained, tmp_path, monkeypatch):
    assert json.loads((trained / "settings.json").read_text())["net"] == RESNET
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "3")) == 0
    for path in (out / "checkpoints").iterdir():
        if path.name != "step-000000005.pt":
            path.unlink()
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "3")) == 0
    assert exact(out / "metrics.csv") == exact(trained / "metrics.csv")
    states = [checkpoint.load(folder / "checkpoints", CPU)[0]["model"] for folder in (out, trained)]
    assert states[0]["bn1.num_batches_tracked"] == 10
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(name.startswith("pixel") for name in states[0])
    assert small_resnet.ResNet(10).load_state_dict(states[0])


def test_a_net_whose_code_has_changed_is_not_continued(packed, trained, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    (out / "report.md").unlink()
    monkeypatch.setattr(
        small_resnet,
        "ResNet",
        lambda classes: torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, classes)
        ),
    )
    assert main(monkeypatch, command(packed, out)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint does not match the net (RuntimeError: Error(s) in loading state_dict" in line
    assert line.endswith("restore the code of the net that the run began with, or choose another --out")


def test_evaluation_and_classification_use_the_running_statistics(packed, trained, call):
    [*_, last] = rows(trained / "evaluations.csv")
    shown = call(alexnet_train, "evaluate", trained)
    assert f"top-1 error {float(last['top1_error']):.2%}" in shown.stdout
    assert f"loss {float(last['loss']):.4f}" in shown.stdout
    net = small_resnet.ResNet(10)
    net.load_state_dict(checkpoint.load(trained / "checkpoints", CPU)[0]["model"])
    pixels = 60 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scaled = pixels / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    found = torch.from_numpy(open_run(trained).logits(pixels.numpy()))
    with torch.inference_mode():
        torch.testing.assert_close(found, net.eval()(scaled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_exported_net_needs_no_factory(form, trained, tmp_path, call):
    path = tmp_path / f"net.{form}"
    assert "logits of 16 validation images" in call(export.main, trained, "--out", path).stdout
    pixels = 60 * torch.randn(3, 3, 64, 64).numpy()
    assert open_export(path).logits(pixels) == pytest.approx(open_run(trained).logits(pixels), abs=1e-3)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_the_state_dict_is_exported_with_the_names_of_the_net(form, trained, tmp_path, call):
    path = tmp_path / f"net.{form}"
    assert "equal bit for bit" in call(export.main, trained, "--out", path).stdout
    read = {"pth": read_pth, "safetensors": read_safetensors}[form]
    assert small_resnet.ResNet(10).load_state_dict(read(path))


def test_the_module_is_found_in_the_current_folder_and_missed_elsewhere(packed, tmp_path, monkeypatch, call):
    home, other, out = tmp_path / "home", tmp_path / "other", tmp_path / "run"
    for folder in (home, other):
        folder.mkdir()
    (home / "my_nets.py").write_text("from tests.small_resnet import ResNet\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(home)
    assert main(monkeypatch, command(packed, out, "--net", "my_nets:ResNet", "--epochs", "1")) == 0
    sys.modules.pop("my_nets")
    sys.path.remove(str(home))
    monkeypatch.chdir(other)
    for arguments in ((alexnet_train, "evaluate", out), (export.main, out, "--out", "net.pt2")):
        found = call(*arguments)
        assert found.returncode in (1, 2)
        assert found.stderr.count("\n") == 1
        assert "start in the folder that holds my_nets, or add that folder to PYTHONPATH" in found.stderr


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:net", "no_such_module:net cannot be imported: ModuleNotFoundError"),
        ("tests.no_such:net", "start in the folder that holds tests"),
        ("tests.small_resnet:Resnet", "small_resnet.py has no Resnet"),
        ("tests.small_resnet:NUMBER", "has a NUMBER that cannot be called"),
        ("model.alexnet:AlexNet", "alexnet-train has its own model; rename your module"),
        ("tests.small_resnet:raising", "KeyError: 'no weights for 10 classes' (*small_resnet.py, line "),
        ("tests.small_resnet:nothing", "returns a value of type NoneType: it must return a torch.nn.Module"),
        ("tests.small_resnet:more_classes", "returns a tensor of shape [2, 11] in evaluation"),
        ("tests.small_resnet:two_outputs", "returns a value of type tuple in evaluation"),
        ("tests.small_resnet:ranked", "returns torch.int64: it must return floating-point"),
        ("tests.small_resnet:Contiguous", "fails in evaluation with pixels [2, 3, 64, 64] in channels_last"),
        ("tests.small_resnet:unsized", "has layers without a size"),
        (
            "tests.small_resnet:in_half",
            "weights that are not fp32: conv1.weight, bn1.weight, bn1.bias, layer1.conv1.weight, ",
        ),
        ("tests.small_resnet:frozen", "has no weights that require a gradient"),
        ("tests.small_resnet:unused", "no gradient reaches extra.weight, extra.bias. Use these weights"),
    ],
)
def test_a_net_that_cannot_be_trained_is_refused_in_one_line(
    factory, message, packed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, "--net", factory)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    start, _, end = message.partition("*")
    assert start in error
    assert end in error
    assert not out.exists()


def test_a_factory_that_returns_the_same_net_again_is_refused(packed, tmp_path, monkeypatch, capsys):
    """Each call would add a division of the input."""
    net = small_resnet.ResNet(10)
    monkeypatch.setattr(small_resnet, "ResNet", lambda classes: net)
    assert main(monkeypatch, command(packed, tmp_path / "run")) == 2
    assert "returns the same net again: it must create a new one at each call" in capsys.readouterr().err


@pytest.mark.parametrize("own", [torch.full((1, 3, 1, 1), 7.0), "an attribute"])
def test_a_net_may_have_a_pixel_std_of_its_own(own, monkeypatch):
    class Own(small_resnet.ResNet):
        def __init__(self, classes: int):
            super().__init__(classes)
            if isinstance(own, torch.Tensor):
                self.register_buffer("pixel_std", own.clone())
            else:
                self.pixel_std = own

    monkeypatch.setattr(small_resnet, "ResNet", Own)
    net = make_net(Settings(net=RESNET, pixel_std=(2, 4, 8)), 10)
    assert torch.equal(net.pixel_std, own) if isinstance(own, torch.Tensor) else net.pixel_std == own
    seen = []
    net.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.full((2, 3, 64, 64), 8.0))
    assert seen[0][0, :, 0, 0].tolist() == [4, 2, 1]


def test_a_module_that_fails_is_refused_with_the_line(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    contents = {
        "wrong_syntax": "x = (\n",
        "ends": "\nraise SystemExit(0)\n",
        "needs": "import no_such_package\n",
    }
    found = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
        assert main(monkeypatch, command(packed, tmp_path / "run", "--net", f"{name}:net")) == 2
        found[name] = capsys.readouterr().err
        assert found[name].count("\n") == 1
    assert "SyntaxError: '(' was never closed (wrong_syntax.py, line 1)" in found["wrong_syntax"]
    assert "SystemExit: 0" in found["ends"]
    assert "No module named 'no_such_package'" in found["needs"]
    assert "start in the folder" not in found["needs"]


def test_layers_are_named_by_the_nets_own_modules():
    chosen = Settings(net=RESNET, crop=64, layer_learning_rates="layer2=0.5,layer2.conv1@1=0,fc=2")
    check_net(chosen, 10)
    model = build_model(chosen, 10, CPU)
    optimizer = make_optimizer(model, chosen)
    set_learning_rate(optimizer, 0.1, epoch=1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"conv1": 0.1, "layer1.conv1": 0.1, "layer2.conv1": 0, "layer2.conv2": 0.05, "fc": 0.2}
    for layer, rate in expected.items():
        assert rates[id(model.get_submodule(layer).weight)] == pytest.approx(rate), layer
    with pytest.raises(
        SettingsError, match="has no weights in layer3; its layers are conv1, bn1, layer1, lay"
    ):
        check_net(Settings(net=RESNET, crop=64, layer_learning_rates="layer3=1"), 10)


def test_weights_that_require_no_gradient_stay_as_they_are(packed, tmp_path, monkeypatch):
    out, factory = tmp_path / "run", "tests.small_resnet:partly_frozen"
    assert main(monkeypatch, command(packed, out, "--net", factory, "--epochs", "1")) == 0
    after = checkpoint.load(out / "checkpoints", CPU)[0]["model"]
    before = build_model(Settings(net=factory, crop=64), 10, CPU)
    changed = {name for name, value in before.named_parameters() if not torch.equal(value, after[name])}
    assert changed == {name for name, value in before.named_parameters() if not name.startswith("layer1.")}


def test_statistics_that_are_not_finite_end_the_run_although_the_weights_are():
    learner = Learner(Settings(net=RESNET, crop=64), 10, ALONE)
    assert Condition.of(learner.step.take_condition().tolist()).weights_finite
    learner.model.bn1.running_var[3] = float("nan")
    assert not Condition.of(learner.step.take_condition().tolist()).weights_finite


def test_fine_tuning_takes_the_net_and_the_mean_of_the_other_run_and_a_new_last_layer(
    packed, trained, tmp_path
):
    given = {"out": tmp_path / "new", "initial_weights": trained, "initial_net": True, "epochs": 1}
    chosen = with_initial_net(Settings.model_validate(given | {"recipe": "finetune"}))
    assert (chosen.net, chosen.crop, chosen.epochs) == (RESNET, 64, 1)
    assert chosen.pixel_mean == read_manifest(packed).pixels.mean
    learner, theirs = Learner(chosen, 4, ALONE), checkpoint.load(trained / "checkpoints", CPU)[0]["model"]
    said = learner.load_initial_weights(trained, read_manifest(packed).classes[:4])
    assert said.endswith(", with a new fc")
    for name, value in learner.model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, theirs[name]), name
    with pytest.raises(SettingsError, match=r"which differs in .*, .*, .*, .* and \d+ more$"):
        Learner(Settings(crop=67, width=0.25), 10, ALONE).load_initial_weights(
            trained, read_manifest(packed).classes
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dropout", "inverted"], "tests.small_resnet:ResNet is not AlexNet: omit --dropout"),
        (["--batch", "12"], "has no weights in fc8; its layers are conv1, bn1, layer1, layer2, fc"),
        (
            ["--net", "alexnet", "--layer-learning-rates", "fc=1"],
            "--layer-learning-rates fc: input should be",
        ),
        (["--net", "alexnet", "--crop", "63"], "--crop 63: input should be greater than or equal to 64"),
    ],
)
def test_settings_that_do_not_suit_the_other_runs_net_are_refused(
    arguments, message, packed, trained, tmp_path, monkeypatch, capsys
):
    given = ["--recipe", "finetune", "--initial-weights", str(trained), "--data", str(packed), *arguments]
    assert main(monkeypatch, ["-m", "trainer.cli", "--out", str(tmp_path / "new"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_fine_tuning_is_one_command_and_does_not_need_the_other_run_once_it_has_begun(
    packed, trained, tmp_path, monkeypatch, capsys
):
    source, out = shutil.copytree(trained, tmp_path / "source"), tmp_path / "new"
    arguments = ["-m", "trainer.cli", "--recipe", "finetune", "--initial-weights", str(source)]
    arguments += ["--data", str(packed), "--out", str(out), "--layer-learning-rates", "fc=10"]
    arguments += ["--epochs", "1", "--batch", "12", "--device", "cpu", "--precision", "fp32", "--port", "0"]
    assert main(monkeypatch, arguments) == 0
    assert f"starting from the weights of {source} after step 10" in capsys.readouterr().out
    recorded = json.loads((out / "settings.json").read_text())
    assert (recorded["net"], recorded["crop"]) == (RESNET, 64)
    shutil.rmtree(source)
    assert main(monkeypatch, arguments) == 0
    assert f"continuing {out} after step 5" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_have_equal_statistics_in_evaluation_and_in_the_checkpoint(packed, tmp_path, call):
    out = tmp_path / "run"
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command(packed, out))
    [*_, last] = rows(out / "evaluations.csv")
    assert f"loss {float(last['loss']):.4f} over 20 images" in call(alexnet_train, "evaluate", out).stdout


@pytest.mark.slow
def test_a_compiled_net_trains_like_the_net_itself(packed, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, "--compile")) == 0
    losses = [[float(row["loss"]) for row in rows(folder / "metrics.csv")] for folder in (out, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
