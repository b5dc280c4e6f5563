"""The baselines: Fisher vectors and sparse codes, compared with formulas and trained on drawn pictures."""

import argparse
import sys

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the extra `baselines` is not installed")
pytest.importorskip("skimage", reason="the extra `baselines` is not installed")
pytest.importorskip("sklearn", reason="the extra `baselines` is not installed")

import cv2
from sklearn.linear_model import orthogonal_mp
from sklearn.mixture import GaussianMixture

from pipeline.manifest import DatasetError, read_manifest
from pipeline.reader import ShardReader
from tests.tools.test_figures import begin_run
from tools.experiments import baselines, features
from tools.experiments.encoders import Fisher, dense_sift, pool, pursue
from tools.experiments.record import TOP1, TOP5
from tools.paper import main
from trainer.settings import SettingsError

QUICK = ("--seeds", "1", "--workers", "1", "--vocabulary", "3000", "--gaussians", "8", "--atoms", "64")


def run(data, out, *arguments):
    parser = argparse.ArgumentParser()
    baselines.add_arguments(parser)
    parser.add_argument("--out")
    given = ["--data", str(data), *QUICK, "--epochs", "20", *arguments]
    options = parser.parse_args(given, argparse.Namespace(out=out))
    out.mkdir(exist_ok=True)
    return baselines.run(options, [])


def test_a_fisher_vector_is_the_gradient_of_the_log_likelihood():
    rng = np.random.default_rng(0)
    mixture = GaussianMixture(3, covariance_type="diag", random_state=0).fit(rng.normal(size=(200, 4)))
    points = rng.normal(0.5, 1.5, (50, 4))
    weights, means, deviations = mixture.weights_, mixture.means_, np.sqrt(mixture.covariances_)
    fisher = Fisher(np.zeros(4), np.eye(4), weights, means, mixture.covariances_)

    def likelihood(logits, means, deviations):
        """Mean over the points. The weights are a softmax, so that they remain weights."""
        prior = logits - np.log(np.exp(logits).sum())
        far = ((points[:, None] - means) / deviations) ** 2
        each = prior - (far / 2 + np.log(deviations) + np.log(2 * np.pi) / 2).sum(2)
        return np.log(np.exp(each).sum(1)).mean()

    def gradient(name):
        given = [np.log(weights), means, deviations]
        slopes = np.empty(given[name].shape)
        for index in np.ndindex(slopes.shape):
            sides = []
            for nudge in (1e-5, -1e-5):
                moved = [values.copy() for values in given]
                moved[name][index] += nudge
                sides.append(likelihood(*moved))
            slopes[index] = (sides[0] - sides[1]) / 2e-5
        return slopes

    root = np.sqrt(weights)
    direct = np.concatenate(
        [
            gradient(0) / root,
            (gradient(1) * deviations / root[:, None]).ravel(),
            -(gradient(2) * deviations / np.sqrt(2) / root[:, None]).ravel(),  # scikit-image's sign
        ]
    )
    direct = np.sign(direct) * np.sqrt(np.abs(direct))
    encoded = fisher.encode(points, np.zeros((50, 2)))
    np.testing.assert_allclose(encoded, direct / np.linalg.norm(direct), atol=1e-4)


def test_pursuing_all_signals_at_once_matches_one_by_one():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(40, 16))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    signals = rng.normal(size=(30, 16))
    single = orthogonal_mp(atoms.T, signals.T, n_nonzero_coefs=5).T
    np.testing.assert_allclose(pursue(signals, atoms), single, atol=1e-3)


def test_a_signal_explained_by_fewer_atoms_still_gets_a_code():
    atoms = np.eye(8)
    signals = np.stack([np.zeros(8), 3 * atoms[2], atoms[1] - 2 * atoms[5]])
    np.testing.assert_allclose(pursue(signals, atoms), signals, atol=1e-3)


def test_codes_are_pooled_by_the_cells_of_their_patches():
    rng = np.random.default_rng(0)
    places, codes = rng.random((60, 2)), rng.random((60, 3))
    expected = []
    for level in (1, 2, 4):
        for row in range(level):
            for column in range(level):
                inside = [
                    code
                    for code, (x, y) in zip(codes, places, strict=True)
                    if column <= x * level < column + 1 and row <= y * level < row + 1
                ]
                expected.append(np.max(inside, axis=0) if inside else np.zeros(3))
    np.testing.assert_array_equal(pool(codes, places), np.concatenate(expected))


def test_descriptors_form_a_grid_at_each_scale_large_enough_for_a_patch():
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (34, 34), np.uint8), (0, 0), 2)
    descriptors, places = dense_sift(image, step=8, scales=5)
    assert len(descriptors) == 3 * 3 + 1 + 1  # at 34, 24 and 17 px
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(34 * places[:4], [(8.5, 8.5), (16.5, 8.5), (24.5, 8.5), (8.5, 16.5)])
    np.testing.assert_allclose(places[-1], (0.5, 0.5))
    flat, _ = dense_sift(np.full((32, 32), 7, np.uint8), step=8, scales=1)
    assert not flat.any()


def test_a_mirrored_picture_has_its_descriptors_mirrored():
    """This holds only if each patch is at its position to the pixel."""
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 255, (33, 33), np.uint8), (0, 0), 2)
    there, back = (
        dense_sift(picture, step=8, scales=1)[0].reshape(3, 3, 4, 4, 8)
        for picture in (image, image[:, ::-1].copy())
    )
    turned = there[:, ::-1, :, ::-1][..., [4, 3, 2, 1, 0, 7, 6, 5]]
    assert np.abs(back - turned).max() < 0.02


@pytest.mark.slow
def test_both_systems_classify_drawn_pictures_and_resume_after_a_kill(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "CHUNK", 16)
    out = tmp_path / "out"
    record = run(packed, out)
    assert [row.system for row in record.rows] == ["sparse coding", "SIFT + Fisher vectors"]
    for row in record.rows:
        # Chance level is 90 and 50; knowing the shape but not the colour gives 50 and 0.
        assert row.values("top-1 error (%)")[0] < 80
        assert row.values("top-5 error (%)")[0] < 35
    whole = {path: path.read_bytes() for path in out.rglob("*.npy")}
    assert len(whole) == 2 * (4 + 2)  # 60 and 20 pictures

    for path in list(whole)[::3]:  # as a kill leaves them
        path.rename(path.with_name(f".{path.name}.partial"))
    for path in out.rglob("errors-*.npz"):
        path.unlink()
    assert run(packed, out).rows == record.rows
    assert {path: path.read_bytes() for path in out.rglob("[!.]*.npy")} == whole
    capsys.readouterr()
    run(packed, out)
    assert not capsys.readouterr().out  # nothing was computed again
    with pytest.raises(SettingsError, match=r"with another step \(4, not 8\): choose another --out"):
        run(packed, out, "--step", "8")


def test_baselines_are_compared_with_nets_image_by_image(packed, tmp_path, monkeypatch):
    for name in ("learn", "encode"):
        monkeypatch.setattr(features, name, lambda *_: None)
    monkeypatch.setattr(features, "bytes_to_come", lambda *_: 0)

    def first_classes_only(_files, labels, *_) -> np.ndarray:
        return np.stack([np.concatenate(labels["val"]) > 6] * 2)

    monkeypatch.setattr(baselines, "linear_errors", first_classes_only)
    (tmp_path / "out" / "baselines" / "fisher-0").mkdir(parents=True)
    net = begin_run(tmp_path / "net", packed)
    record = run(packed, tmp_path / "out", "--only", "fisher", "--nets", str(net))
    cnn, fisher = record.rows
    labels = ShardReader(packed, read_manifest(packed), "val").rows["label"]
    np.testing.assert_array_equal(fisher.table(TOP1)[0], 100 * (labels > 6))  # in the order of the shards
    assert (cnn.system, fisher.than) == ("CNN", "CNN")
    assert fisher.published == {TOP1: 8.2, TOP5: 8.7}
    np.testing.assert_array_equal(record.result(fisher, TOP1).table, fisher.table(TOP1) - cnn.table(TOP1))


@pytest.mark.parametrize("arguments", [("--seeds", "3", "--nets", "a", "b"), ("--limit", "9", "--nets", "a")])
def test_nets_that_cannot_be_compared_are_refused(arguments, packed, tmp_path):
    with pytest.raises(SettingsError, match="--nets needs one run or as many as --seeds"):
        run(packed, tmp_path / "out", *arguments)


@pytest.mark.slow
def test_worker_processes_and_another_run_give_the_same_features(packed, tmp_path):
    alone, many = tmp_path / "alone", tmp_path / "many"
    few = ("--limit", "12", "--epochs", "1", "--step", "16")
    rows = [run(packed, alone, *few).rows, run(packed, many, *few, "--workers", "2").rows]
    assert rows[0] == rows[1]
    files = [path.relative_to(alone) for path in alone.rglob("*.npy")]
    assert len(files) == 4
    assert all((alone / file).read_bytes() == (many / file).read_bytes() for file in files)


def test_a_limit_takes_pictures_from_all_shards(packed):
    [chunk] = features.Pictures(packed, 30, 4, 5).chunks("train")
    assert len(set(chunk)) == 30
    assert set(np.digitize(chunk, [25, 50])) == {0, 1, 2}  # the shards have 25, 25 and 10


def test_a_picture_that_cannot_be_decoded_is_named(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(features.ShardReader, "jpeg", lambda self, number: memoryview(b"no JPEG"))
    with pytest.raises(
        DatasetError, match=r"the sample in .*train-00000\d.tar at byte \d+ cannot be decoded"
    ):
        run(packed, tmp_path / "out")


def test_too_few_patches_to_learn_from_are_refused(packed, tmp_path):
    few = ("--only", "sparse", "--limit", "1", "--vocabulary", "64", "--atoms", "65")
    with pytest.raises(SettingsError, match=r"^64 patches with a gradient are too few to learn 65 words,"):
        run(
            packed,
            tmp_path / "out",
            *few,
        )


def test_features_that_do_not_fit_on_the_disk_are_not_started(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    with pytest.raises(SettingsError, match=r"the features need 0.0 GB and .* has 0.0 GB free"):
        run(packed, tmp_path / "out", "--only", "fisher", "--limit", "10")


def test_a_missing_package_is_named_with_how_to_install_it(packed, tmp_path, monkeypatch):
    for name in ("tools.experiments.features", "tools.experiments.encoders"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("tools.experiments.features")
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(sys, "argv", ["paper.py", "baselines", "--data", str(packed), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"pip install 'alexnet-train\[baselines\]'"):
        main()
