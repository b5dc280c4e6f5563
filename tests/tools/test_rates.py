"""Learning rates are chosen on images held out of the training split."""

import argparse

import numpy as np
import pytest

from pipeline.manifest import DatasetError, read_manifest, write_manifest
from pipeline.reader import ShardReader
from tests.tools.test_paper import QUICK
from tests.trees import pack_here
from tools.experiments import rates
from tools.experiments.held_out import hold_out
from tools.experiments.rates import Sweep
from tools.experiments.record import Trial
from tools.experiments.training import TrainingError
from trainer.run import Run

TRIALS = [
    Trial(system=system, rate=rate, error=error)
    for system, errors in {"AlexNet": (30.0, 20.0, 25.0), "tanh": (None, 40.0, 39.0)}.items()
    for rate, error in zip((0.1, 0.01, 0.001), errors, strict=True)
]


def test_the_last_training_shard_is_held_out(packed, tmp_path):
    before = read_manifest(packed)
    data = hold_out(packed, tmp_path)
    manifest = read_manifest(data)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 40, "val": 20}
    whole, train, val = (
        ShardReader(root, read_manifest(root), split)
        for root, split in ((packed, "train"), (data, "train"), (data, "val"))
    )
    kept = [bytes(reader.jpeg(number)) for reader in (train, val) for number in range(len(reader))]
    assert kept == [bytes(whole.jpeg(number)) for number in range(60)]
    labels = np.concatenate([train.rows["label"], val.rows["label"]])
    np.testing.assert_array_equal(labels, whole.rows["label"])
    assert manifest.pixels == before.pixels
    assert manifest.fingerprint != before.fingerprint
    (data / manifest.split("train").shards[0].file).unlink()
    (data / manifest.split("train").shards[0].file).symlink_to(tmp_path / "where the dataset was")
    assert hold_out(packed, tmp_path) == data
    assert ShardReader(data, manifest, "train").jpeg(0) == whole.jpeg(0)


def test_at_least_a_tenth_of_the_images_is_held_out(pictures, tmp_path):
    """The 60 images are in 12 shards, of which one holds less than a tenth."""
    data = tmp_path / "data"
    pack_here("--input", pictures, "--out", data, "--size", "80", "--shard-samples", "5")
    splits = read_manifest(hold_out(data, tmp_path)).splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 50, "val": 10}


def test_a_single_shard_has_no_part_to_hold_out(packed, packed_copy, tmp_path):
    manifest = read_manifest(packed)
    one = manifest.split("val")
    write_manifest(packed_copy, manifest.model_copy(update={"splits": {"train": one, "val": one}}))
    with pytest.raises(DatasetError, match=r"none would be left.*--shard-samples"):
        hold_out(packed_copy, tmp_path)


def test_the_rate_with_the_lowest_error_is_chosen():
    found = Sweep(TRIALS, "budget")
    assert found.setting("AlexNet") == ["--learning-rate", "0.01"]
    assert found.setting("tanh") == ["--learning-rate", "0.001"]
    end = "The best learning rate tried is an end of the range for tanh: one beyond it may be better."
    assert found.remarks() == ["budget", end]
    assert Sweep(TRIALS[:3], "budget").remarks() == ["budget"]
    assert Sweep(TRIALS[:1], "budget").remarks() == ["budget"]  # one rate is no range


def test_without_rates_the_settings_are_unchanged():
    assert Sweep([], "").setting("tanh") == Sweep([], "").remarks() == []


def test_a_net_that_always_diverges_is_refused():
    with pytest.raises(TrainingError, match="tanh diverged at each of --rates"):
        Sweep(TRIALS[3:4], "").best("tanh")


@pytest.mark.slow
def test_trials_see_only_training_images_and_may_diverge(packed, tmp_path):
    parser = argparse.ArgumentParser()
    rates.add_arguments(parser)
    options = parser.parse_args(["--rates", "0.003", "1e9"], argparse.Namespace(jobs=2))
    settings = ["--data", str(packed), *QUICK, "--log-every", "1"]
    found = rates.sweep(options, settings, {"one tower": ["--towers", "1"]}, tmp_path)
    learned, diverged = found.trials
    assert (learned.system, learned.rate, diverged.rate) == ("one tower", 0.003, 1e9)
    assert learned.error is not None
    assert diverged.error is None
    assert "trials of 1 epoch with seed 0, by the error on 20 training images" in found.budget
    used = Run(tmp_path / "one-tower-0.003").settings()
    assert (used.towers, used.learning_rate, used.epochs) == (1, 0.003, 1)
    assert read_manifest(used.data).fingerprint != read_manifest(packed).fingerprint
    logs = {path: path.read_text() for path in tmp_path.glob("*.log")}
    assert rates.sweep(options, settings, {"one tower": ["--towers", "1"]}, tmp_path) == found
    assert {path: path.read_text() for path in logs} == logs  # neither was trained again
