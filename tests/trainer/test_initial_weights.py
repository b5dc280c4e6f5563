"""Training that starts from the weights of another run."""

from pathlib import Path

import pytest
import torch

from pipeline.manifest import read_manifest
from tools.make_shards import pack, parse_arguments
from trainer import checkpoint
from trainer.learner import Learner
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings, SettingsError

WORLD = World(0, 1, 0, torch.device("cpu"))


def learner(classes: int, **settings: object) -> Learner:
    return Learner(Settings(crop=67, width=0.25, **settings), classes, WORLD)


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory) -> Path:
    """A run folder with a checkpoint of random weights drawn with seed 1."""
    run = Run(tmp_path_factory.mktemp("trained"))
    run.begin(Settings(crop=67, width=0.25, seed=1, data=packed), read_manifest(packed)).close()
    checkpoint.write(run.checkpoints, 7, {"step": 7, **learner(10, seed=1).state()}, keep=1)
    return run.folder


@pytest.fixture(scope="module")
def four_classes(pictures, tmp_path_factory) -> Path:
    """A dataset with four of the ten classes."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("four")
    for split in ("train", "val"):
        (source / split).mkdir()
        for folder in sorted((pictures / split).iterdir())[:4]:
            (source / split / folder.name).symlink_to(folder)
    pack(
        parse_arguments(
            ["--input", str(source), "--out", str(output), "--size", "80", "--workers", "1"]
        ).packing
    )
    return output


def test_with_the_same_classes_all_weights_are_loaded(trained, packed):
    begun = learner(10)
    said = begun.load_initial_weights(trained, read_manifest(packed).classes)
    assert said == f"starting from the weights of {trained} after step 7"
    expected = learner(10, seed=1).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in begun.model.state_dict().items())


def test_with_other_classes_the_last_layer_keeps_its_initial_weights(trained, four_classes):
    begun, own, theirs = learner(4), learner(4).model.state_dict(), learner(10, seed=1).model.state_dict()
    said = begun.load_initial_weights(trained, read_manifest(four_classes).classes)
    assert said.endswith(", with a new fc8")
    for name, value in begun.model.state_dict().items():
        assert torch.equal(value, (own if name.startswith("fc8.") else theirs)[name]), name


def test_convolutions_alone_can_be_loaded_into_a_net_with_one_more(trained, packed):
    begun, theirs = learner(10, conv6=True), learner(10, seed=1)
    own = learner(10, conv6=True).model.state_dict()
    said = begun.load_initial_weights(trained, read_manifest(packed).classes, "convolutions")
    assert said.endswith(", convolutions only")
    expected = own | {
        name: value
        for name, value in theirs.model.state_dict().items()
        if name.partition(".")[0] in ("conv1", "conv2", "conv3", "conv4", "conv5")
    }
    assert all(torch.equal(value, expected[name]) for name, value in begun.model.state_dict().items())


def test_another_net_is_refused_with_the_layers_that_differ(trained, packed):
    with pytest.raises(SettingsError, match=r"which differs in conv6\.bias, conv6\.weight$"):
        learner(10, conv6=True).load_initial_weights(trained, read_manifest(packed).classes)


def test_a_run_without_a_checkpoint_is_refused(packed, tmp_path):
    with pytest.raises(SettingsError, match="no run in"):
        learner(10).load_initial_weights(tmp_path, read_manifest(packed).classes)
    Run(tmp_path).begin(Settings(data=packed, crop=64), read_manifest(packed)).close()
    with pytest.raises(SettingsError, match="has no checkpoint yet"):
        learner(10).load_initial_weights(tmp_path, read_manifest(packed).classes)
