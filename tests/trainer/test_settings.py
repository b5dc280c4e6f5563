"""Settings: which source takes precedence, what --help shows, and what is refused."""

import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from model.alexnet import Variant
from tests.helpers import REPO
from trainer.setting_groups import PAPER_ONLY
from trainer.setting_sources import RECIPES, load_settings, read_recipe
from trainer.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("ALEXNET_")]:
        monkeypatch.delenv(name)


def test_the_command_line_overrides_the_environment_the_recipe_and_defaults(monkeypatch):
    assert load_settings([]).epochs == 90
    assert load_settings(["--recipe", "code2012"]).epochs == 91
    monkeypatch.setenv("ALEXNET_EPOCHS", "7")
    assert load_settings(["--recipe", "code2012"]).epochs == 7
    assert load_settings(["--recipe", "code2012", "--epochs", "3"]).epochs == 3
    assert load_settings(["--recipe", "code2012", "--epochs=3"]).drop_epochs == (25, 51, 79)


def test_the_environment_can_choose_the_recipe(monkeypatch):
    monkeypatch.setenv("ALEXNET_RECIPE", "code2012")
    assert load_settings([]).preset == "code2012"


def test_boolean_flags_lists_and_the_run_folder_are_parsed():
    settings = load_settings(["--recipe", "fast", "--no-compile", "--drop-epochs", "3,5.5", "--data", "d"])
    assert settings.compile is False
    assert settings.drop_epochs == (3.0, 5.5)
    assert str(settings.run_folder) == "runs/fast"
    assert str(load_settings(["--out", "x"]).run_folder) == "x"


def test_every_recipe_is_valid():
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    assert {"paper", "code2012", "fast", "large-batch", "demo", "small", "finetune"} <= set(names)
    for name in names:
        assert read_recipe(name)
        load_settings(["--recipe", name, "--initial-weights", "runs/a"])


def test_each_setting_of_code2012_says_where_it_stands_in_the_release():
    table = (REPO / "docs" / "paper.md").read_text()
    lines = (RECIPES / "code2012.toml").read_text().splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        assert re.search(r"  # .*\w\.(cfg|py|cu)", line), line
        assert f"\n| `{line.split()[0]}` | " in table, line


def test_code2012_eighth_has_the_settings_of_code2012_at_the_same_parts_of_its_epochs():
    whole, eighth = (
        load_settings(["--recipe", recipe])
        for recipe in ("code2012", str(REPO / "docs/benchmarks/recipes/code2012-eighth.toml"))
    )
    scaled = {"drop_epochs", "layer_learning_rates", "freeze_conv1_epoch", "colour_epochs"}
    given = {"recipe", "epochs", "batch", "crop", "crop_chunk", "learning_rate"}
    different = {name for name in type(whole).model_fields if getattr(whole, name) != getattr(eighth, name)}
    assert different == scaled | given

    def epochs(settings: Settings, name: str) -> np.ndarray:
        if name == "layer_learning_rates":
            assert list(settings.layer_learning_rates.values()) == [0.1]
            return np.array([float(layer.removeprefix("conv1@")) for layer in settings.layer_learning_rates])
        return np.atleast_1d(getattr(settings, name))

    for name in scaled:
        expected = eighth.epochs / whole.epochs * epochs(whole, name)
        tolerance = 0.5 if name == "colour_epochs" else 0.05  # a whole number, and one decimal
        assert epochs(eighth, name) == pytest.approx(expected, abs=tolerance)


def test_a_recipe_can_be_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 5\nlearning_rate = 0.3\n")
    settings = load_settings(["--recipe", str(path)])
    assert (settings.epochs, settings.learning_rate) == (5, 0.3)
    assert str(settings.run_folder) == "runs/mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epocs", "3"], "--epocs; did you mean --epochs?"),
        (["--epocs=3"], "--epocs=3; did you mean --epochs?"),
        (["--recipe", "papr"], "papr; did you mean paper?"),
        (["--epochs", "0"], "--epochs 0"),
        (["--preset", "torchvision", "--no-lrn", "--towers", "1"], "omit --lrn, --towers"),
        (["--epochs", "many"], "--epochs many"),
        (["--momentum", "1"], "--momentum 1"),
        (["--precision", "fp8"], "'bf16', 'fp16' or 'fp32'"),
        (["--port", "70000"], "--port 70000"),
        (["--crop", "63"], "--crop 63: input should be greater than or equal to 64"),
        (["--evaluate-epochs", "2"], "--evaluate-epochs 2: --schedule plateau needs each epoch's error"),
        (["--stop-after", "5"], "--stop-after 5 would end the run before --schedule plateau lowers"),
        (["--stop-after", "0"], "--stop-after 0"),
        (["--optimizer", "adam"], "--optimizer adam: input should be 'sgd' or 'lars'"),
        (["--trust-coefficient", "0.1"], "--trust-coefficient is only for LARS: add --optimizer lars"),
        (["--trust-coefficient", "0", "--optimizer", "lars"], "--trust-coefficient 0: "),
        (["--rate-rule", "cubic"], "--rate-rule cubic: input should be 'fixed', 'sqrt' or 'linear'"),
        (["--base-batch", "256"], "--base-batch has no effect: add --rate-rule sqrt or linear"),
        (["--device", "cuda:x"], "--device cuda:x"),
        (["--epochs"], "--epochs"),
        (["stray"], "stray"),
        (["--epochs", ""], "--epochs '': input should be a valid integer"),
        (["--epochs", "9" * 5000], f"--epochs {'9' * 60}…: "),
        (["--seed", str(2**64)], f"--seed {2**64}: input should be less than {2**64}"),
        (["--seed", "-1"], "--seed -1"),
        (["--batch", str(2**31)], "--batch 2147483648"),
        (["--threads", "1025"], "--threads 1025"),
        (["--prefetch", "100000"], "--prefetch 100000"),
        (["--checkpoint-seconds", "1" + "0" * 400], "--checkpoint-seconds 1000"),
        (["--stall-seconds", "inf"], "--stall-seconds inf: input should be a finite number"),
        (["--stall-seconds", "1e300"], "--stall-seconds 1e300"),
        (["--weight-decay", "inf"], "--weight-decay inf"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--learning-rate", "1e39"], "--learning-rate 1e39"),
        (["--momentum=-inf"], "--momentum -inf"),
        (["--drop-epochs", "3,inf"], "--drop-epochs inf"),
        (["--layer-learning-rates", "conv1=inf"], "--layer-learning-rates inf"),
        (["--layer-learning-rates", "conv1"], "--layer-learning-rates ''"),
        (["--layer-learning-rates", "conv1@5=-1"], "--layer-learning-rates -1"),
        (
            ["--layer-learning-rates", "conv9=1"],
            "--layer-learning-rates conv9: input should be a layer, such",
        ),
        (["--warmup-epochs", "inf"], "--warmup-epochs inf"),
        (["--hw-decoder-load", "nan"], "--hw-decoder-load nan"),
        (["--width", "1e9"], "--width 1e9"),
        (["--preset", "bvlc", "--conv6"], "--preset bvlc is a fixed net: omit --conv6"),
        (["--net", "resnet"], "--net resnet: input should be alexnet, or a module and a function in it"),
        (
            ["--net", "a:b", "--preset", "code2012", "--no-lrn"],
            "--net a:b is not AlexNet: omit --preset, --lrn",
        ),
        (["--net", "a:b", "--convolutions", "towers"], "--net a:b is not AlexNet: omit --convolutions"),
        (["--net", "a:b", "--freeze-conv1-epoch", "2"], "omit --freeze-conv1-epoch"),
        (["--net", "a:b", "--recipe", "fast"], "omit --preset, --dropout, and use a recipe without them"),
        (["--pixel-std", "1,1,1"], "--pixel-std is only for nets that --net names"),
        (["--pixel-mean", "1,2"], "--pixel-mean 1,2: input should be three numbers"),
        (["--pixel-mean", "1,2,x"], "--pixel-mean x"),
        (["--net", "a:b", "--pixel-std", "1,0,1"], "--pixel-std 0: input should be greater than 0"),
        (["--initial-net"], "--initial-net needs --initial-weights"),
    ],
)
def test_an_error_names_the_invalid_argument(arguments, message):
    with pytest.raises(SettingsError) as error:
        load_settings(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_every_setting_in_groups_and_says_what_to_type(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        load_settings(["--help"])
    shown = capsys.readouterr().out
    for title in ("Data and run", "Net", "Optimisation", "Hardware", "Robustness"):
        assert f"\n{title}:\n" in shown
    for name, field in Settings.model_fields.items():
        assert f"  --{name.replace('_', '-')}" in shown
        assert field.description
        assert re.match(r"[A-Z].*\.$", field.description, re.DOTALL), name
    assert "--epochs N " in shown
    assert "--drop-epochs N,N,…" in shown
    assert "--schedule {plateau,steps,cosine}" in shown
    assert not re.findall(r"--[a-z-]+ (?:int|float|str|bool|Path|tuple|dict)\b.*", shown)


def test_the_settings_for_the_papers_net_alone_are_its_variant_and_its_convolutions():
    marked = {name for name, field in Settings.model_fields.items() if PAPER_ONLY in field.metadata}
    assert marked == {field.name for field in fields(Variant)} | {"convolutions"}


def test_unknown_names_in_the_environment_and_in_recipes_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epocs = 5\n")
    with pytest.raises(SettingsError, match=r"'epocs' in the recipe; did you mean epochs\?"):
        load_settings(["--recipe", str(path)])
    path.write_text("epochs == 5\n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings(["--recipe", str(path)])
    monkeypatch.setenv("ALEXNET_EPOCS", "5")
    with pytest.raises(SettingsError, match=r"ALEXNET_EPOCS .*did you mean ALEXNET_EPOCHS\?"):
        load_settings([])


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer/cli.py", "--help"],
        ["trainer/cli.py", "evaluate", "--help"],
        ["trainer/cli.py", "demo", "--help"],
        ["trainer/cli.py", "--epocs", "3"],
        ["trainer/cli.py", "--data", "/nowhere"],
        ["tools/make_shards.py", "--help"],
        ["tools/draw_pictures.py", "--help"],
        ["tools/bench.py", "--help"],
        ["tools/export.py", "--help"],
        ["tools/import_weights.py", "--help"],
        ["tools/classify.py", "--help"],
    ],
)
def test_help_and_errors_do_not_import_torch_or_dali(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nvidia.dali', 'webdataset', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("epochs = true", "epochs = True in the recipe"),
        ("learning_rate = inf", "learning_rate = inf in the recipe"),
        ("learning_rate = nan", "learning_rate = nan in the recipe"),
        ("epochs = [1, 2]", "epochs = [1, 2] in the recipe"),
        ("epochs = {a = 1}", "epochs = {'a': 1} in the recipe"),
        ("epochs = 2026-01-01", "epochs = 2026-01-01 in the recipe"),
        ("lrn = 'maybe'", "lrn = maybe in the recipe"),
        ('data = "a\\u0000b"', "zero byte"),
        ("data = 5", "data = 5 in the recipe"),
        ("[model]\nlrn = false", "unknown setting 'model' in the recipe"),
        ("[net]\nlrn = false", "net = {'lrn': False} in the recipe"),
        ("drop_epochs = [1, 'x']", "drop_epochs = x in the recipe"),
        ("layer_learning_rates = [1]", "layer_learning_rates = [1] in the recipe"),
        (
            "layer_learning_rates.conv9 = 1",
            "layer_learning_rates = conv9 in the recipe",
        ),
        ("layer_learning_rates.'conv1@x' = 1", "layer_learning_rates = conv1@x in the recipe"),
    ],
)
def test_an_error_names_the_recipe_with_the_invalid_value(tmp_path, line, what):
    path = tmp_path / "mine.toml"
    path.write_text(line)
    with pytest.raises(SettingsError) as error:
        load_settings(["--recipe", str(path)])
    assert what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("# café\nepochs = 3\n".encode("latin-1"), "not in UTF-8, but perhaps in Latin-1"),
        ("epochs = 3\n".encode("utf-16"), "is in UTF-16"),
    ],
)
def test_a_recipe_in_another_encoding_is_named(tmp_path, content, what):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=what) as error:
        load_settings(["--recipe", str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", ["", "abc", "inf", "1.5", "1e400", "\udcff"])
def test_a_malformed_variable_is_named(monkeypatch, value):
    monkeypatch.setenv("ALEXNET_EPOCHS", value)
    with pytest.raises(SettingsError) as error:
        load_settings([])
    assert f"ALEXNET_EPOCHS={value} in the environment" in str(error.value)


def test_the_environment_does_not_change_recorded_settings(monkeypatch):
    monkeypatch.setenv("ALEXNET_EPOCHS", "7")
    assert Settings.model_validate({}).epochs == 90


def test_the_largest_seed_is_usable():
    import torch

    torch.manual_seed(load_settings(["--seed", str(2**64 - 1)]).seed)
