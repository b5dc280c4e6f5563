"""alexnet-train paper towers: both nets are really trained, in three processes; bad settings are refused."""

from argparse import Namespace

import pytest

from tools.experiments.record import Record
from tools.experiments.two_towers import HALF, ONE, TWO, WEIGHT, comparable, run, shared_device
from trainer.setting_sources import load_settings
from trainer.settings import Settings, SettingsError


@pytest.mark.slow
def test_two_towers_train_like_the_net_on_one_device(packed, tmp_path):
    settings = ["--data", str(packed), "--preset", "code2012", "--recipe", "demo", "--crop", "64"]
    settings += ["--batch", "12", "--warmup-epochs", "0", "--width", "0.125", "--device", "cpu"]
    record = run(Namespace(out=tmp_path, steps=2), settings)
    assert Record.read(record.save(tmp_path)) == record
    assert [path.name for path in tmp_path.iterdir()] == ["towers.json"]
    one, two, half = (record.row(name).measured for name in (ONE, TWO, HALF))
    assert two["parameters (millions)"] == one["parameters (millions)"] > half["parameters (millions)"]
    assert two["loss of step 2"] == pytest.approx(one["loss of step 2"], rel=1e-5)
    assert two[WEIGHT][0] < 1000  # of a million
    assert two["loss of step 2"] != pytest.approx(half["loss of step 2"], rel=1e-3)
    # Forward and back: conv3 sees 3×3 maps, fc6 single values and fc7 units. fc7's half goes one way.
    # At an eighth of its width, a tower has 16 maps there and 256 units.
    sent = 4 * (2 * (16 * 9 + 16 + 256) + 256)
    assert two["sent by each tower per image (kB)"] == [sent / 1000]


def test_dropout_and_compilation_are_off_and_precision_defaults_to_fp32():
    given = load_settings(["--recipe", "fast", "--dropout", "inverted"])
    assert (given.compile, given.precision) == (True, "auto")
    settings = comparable(given)
    assert (settings.dropout, settings.compile, settings.precision) == ("off", False, "fp32")
    assert comparable(Settings(precision="bf16")).precision == "bf16"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"towers": 1}, "remove --towers"),
        ({"conv6": True}, "remove --towers, --conv6"),
        ({"without": "conv3"}, "--conv6 and --without"),
        ({"precision": "fp16"}, "use bf16"),
    ],
)
def test_nets_without_two_towers_are_refused(other, message):
    with pytest.raises(SettingsError, match=message):
        comparable(Settings(**other))


def test_two_gpus_are_used_if_there_are_two():
    assert [shared_device(Settings(), gpus) for gpus in (0, 1, 2, 8)] == ["cpu", "cpu", "cuda", "cuda"]
    assert shared_device(Settings(device="cpu"), 2) == "cpu"


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)])
def test_a_single_gpu_is_refused(device, gpus):
    with pytest.raises(SettingsError, match=rf"--device {device}: .* and torch finds {gpus}"):
        shared_device(Settings(device=device), gpus)
