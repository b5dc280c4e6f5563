"""Fig. 3 and Fig. 4 of a net with its initial weights, and the search on which they rely."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.manifest import read_manifest, write_manifest
from tools import paper
from tools.experiments import codes, fc7, figure3, figure4, figure4_drawing
from tools.experiments.fc7 import cached_features, features, nearest, take
from tools.experiments.figure3 import (
    COLUMNS,
    GAP,
    LABEL,
    SCALE,
    by_tower,
    colour_shares,
    draw,
    permutation_test,
)
from tools.experiments.figure4_drawing import Classified, Picture, plt
from tools.experiments.finished import Finished, open_net, open_run
from trainer import checkpoint
from trainer.build import build_model
from trainer.run import Run, RunError
from trainer.setting_sources import load_settings
from trainer.settings import Settings, SettingsError

CPU = torch.device("cpu")


def begin_run(folder: Path, data: Path) -> Path:
    """Begin a run and save it before its first step."""
    settings = load_settings(["--data", str(data), "--recipe", "demo", "--crop", "64", "--precision", "fp32"])
    manifest = read_manifest(data)
    run = Run(folder)
    run.begin(settings, manifest).close()
    model = build_model(settings, len(manifest.classes), CPU)
    checkpoint.write(run.checkpoints, 0, {"model": model.state_dict(), "step": 0}, keep=1)
    return folder


@pytest.fixture(scope="module")
def finished_run(packed, tmp_path_factory) -> Path:
    return begin_run(tmp_path_factory.mktemp("runs") / "a", packed)


def options(module, out: Path, *arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    out.mkdir(exist_ok=True)
    return parser.parse_args([*map(str, arguments), "--device", "cpu"], argparse.Namespace(out=out))


@pytest.fixture(scope="module")
def opened(finished_run, tmp_path_factory) -> Finished:
    return open_run(options(figure4, tmp_path_factory.mktemp("out"), finished_run))


def test_figure_3_shows_the_weights_of_each_tower(opened, finished_run, tmp_path):
    record = figure3.run(options(figure3, tmp_path / "out", finished_run), [])
    weights = opened.trained.model.conv1.weight.detach().numpy()
    with Image.open(tmp_path / "out" / record.figures[0].file) as image:
        sheet = np.asarray(image).astype(float)
    side = 11 * SCALE + GAP
    for number, kernel in enumerate(weights):  # rows of 16: the first 48 above, the other 48 below
        row, column = divmod(number, COLUMNS)
        top = LABEL + row * side + LABEL * (number >= 48)
        # The middle of each weight's square of pixels.
        shown = sheet[top + SCALE // 2 :: SCALE, column * side + SCALE // 2 :: SCALE][:11, :11]
        expected = kernel.transpose(1, 2, 0) / np.abs(kernel).max()
        np.testing.assert_allclose((shown - 127.5) / 127.5, expected, atol=1 / 127)
    assert sheet.shape == (2 * LABEL + 6 * side - GAP, COLUMNS * side - GAP, 3)
    first, second, difference = record.rows
    assert [first.system, second.system] == ["tower 1, 48 kernels", "tower 2, 48 kernels"]
    shares = [row.measured[figure3.COLOUR] for row in (first, second)]
    # Two means of 48 kernels each differ by chance by σ·√(2/48 · 2/π) on average.
    kernels = figure3.colour_shares(by_tower(weights, 1)[0])
    by_chance = float(100 * kernels.std() * (2 / 48 * 2 / np.pi) ** 0.5)
    excess = abs(shares[0][0] - shares[1][0]) - by_chance
    assert difference.measured[figure3.EXCESS] == pytest.approx([excess], abs=0.1 * by_chance)
    assert "the towers are not shown to differ" in record.remarks[-1]  # nothing has been learnt
    assert "not shown: p = 0." in difference.claims[figure3.EXCESS]


@pytest.mark.parametrize(("kernels", "rows", "columns"), [(12, 1, 12), (16, 1, 16), (17, 2, 9), (48, 3, 16)])
def test_figure_3_fills_its_rows_evenly(kernels, rows, columns):
    side = 11 * SCALE + GAP
    sheet = draw(np.ones((2, kernels, 11, 11, 3)))
    assert sheet.size == (columns * side - GAP, 2 * (LABEL + rows * side) - GAP)


def test_towers_that_differ_in_colour_are_found_whichever_of_them_is_coloured():
    """In 10 runs, one tower's 12 kernels have shares around .6 and the other's around .4, in turn."""
    rng = np.random.default_rng(1)
    shares = rng.normal(0.5, 0.2, (10, 2, 12))
    specialised = shares + np.array([[0.1], [-0.1]]) * np.array([1, -1] * 5)[:, None, None]
    chance, p = permutation_test(specialised)
    assert p == pytest.approx(1 / 10_001)  # no exchange of 10,000 is as extreme
    # The mean of |x| is σ·√(2/π), where σ is that of a difference of two means of 12 values with a
    # deviation of √(.2² + .1²).
    assert chance.mean() == pytest.approx((0.05 * 2 / 12 * 2 / np.pi) ** 0.5, rel=0.1)
    reversed_chance, reversed_p = permutation_test(specialised[::-1, ::-1])
    assert reversed_chance[::-1] == pytest.approx(chance, rel=0.1)
    assert reversed_p == p


def test_p_is_uniform_if_kernels_are_alike_in_both_towers():
    rng = np.random.default_rng(2)
    values = [permutation_test(rng.normal(0.5, 0.2, (2, 2, 6)))[1] for _ in range(100)]
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.09)  # three standard errors
    assert np.mean(values) == pytest.approx(0.5, abs=0.09)


def test_p_of_two_kernels_in_each_tower_is_that_of_all_exchanges():
    """Of the six ways to divide 0, 0, 1, 1, the two that separate them are as extreme as the measured one."""
    [chance], p = permutation_test(np.array([[[0.0, 0.0], [1.0, 1.0]]]))
    assert (chance, p) == pytest.approx((1 / 3, 1 / 3), abs=0.015)


def test_a_gray_kernel_has_no_colour_and_a_single_channel_two_thirds():
    gray, red = np.ones((3, 11, 11)), np.zeros((3, 11, 11))
    red[0] = 1
    np.testing.assert_allclose(colour_shares(by_tower(np.stack([gray, red]), 1)[0]), [0, 2 / 3], atol=1e-12)
    assert draw(by_tower(np.zeros((2, 3, 11, 11)), 2)).getpixel((0, LABEL)) == (128, 128, 128)


@pytest.mark.parametrize("values", ["real", "few"])  # with few values, many distances are equal
def test_neighbours_match_a_naive_search(values, monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((90, 8)) * 20 if values == "real" else rng.integers(0, 2, (90, 8))
    rows = rows.astype(np.float16)
    rows[70] = rows[3]
    queries = np.concatenate([rows[[3, 50]], rows[[8]] + np.float16(0.25)])
    expected = [
        sorted((np.sqrt(((row - query) ** 2).sum()), number) for number, row in enumerate(rows.astype(float)))
        for query in queries.astype(float)
    ]
    monkeypatch.setattr(fc7, "MEMORY", 7 * (10 * 8 + 40 * 3))  # seven rows at a time
    distances, numbers = nearest(queries, [rows[:40], rows[40:41], rows[41:]], 6, CPU)
    assert numbers.tolist() == [[number for _, number in best[:6]] for best in expected]
    np.testing.assert_allclose(distances, [[d for d, _ in best[:6]] for best in expected], atol=1e-5)
    assert numbers[0, :2].tolist() == [3, 70]


def test_features_are_kept_in_the_order_of_the_images_and_computed_once(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(fc7, "PART", 25)
    parts = cached_features(opened, "train", tmp_path)
    assert [part.shape for part in parts] == [(20, 4096)] * 3
    some = np.array([0, 19, 20, 59])
    expected = np.concatenate([features(opened, opened.pixels("train", number)) for number in some])
    np.testing.assert_allclose(take(parts, some), expected, rtol=2e-3, atol=1e-4)
    assert len(np.unique(expected, axis=0)) == 4

    [lost] = tmp_path.rglob("train-00001-of-00003.npy")
    lost.unlink()
    computed = []
    monkeypatch.setattr(fc7, "features", lambda *given: computed.append(1) or features(*given))
    again = cached_features(opened, "train", tmp_path)
    assert len(computed) == 1
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(parts))


def test_another_net_gets_its_own_features(opened):
    before = fc7.identity(opened)
    with torch.no_grad():
        opened.trained.model.fc8.bias[0] += 1
        changed = fc7.identity(opened)
        opened.trained.model.fc8.bias[0] -= 1
    assert len({before, changed, fc7.identity(opened._replace(precision="bf16"))}) == 3


def test_activations_that_fp16_cannot_hold_are_refused(opened):
    with pytest.raises(RunError, match="not finite in fp16"):
        features(opened, torch.full((1, 3, 64, 64), torch.nan))


def test_figure_4_shows_the_nearest_training_images(opened, finished_run, tmp_path):
    out = tmp_path / "out"
    record = figure4.run(options(figure4, out, finished_run, "--queries", 3, 19, "--images", 0, 5, 7), [])
    with Image.open(out / record.figures[0].file) as image:
        image.load()
    assert "of the 3 images" in record.remarks[0]
    assert "the 12 nearest training images" in record.remarks[0]
    index = np.concatenate(cached_features(opened, "train", out)).astype(float)
    for shown in figure4.retrieve(opened, [3, 19], np.arange(60), out):
        own = features(opened, opened.pixels("val", shown.query.number)).astype(float)
        distances = np.sqrt(((index - own) ** 2).sum(1))
        assert [picture.number for picture, _ in shown.nearest] == distances.argsort()[:6].tolist()
        np.testing.assert_allclose([d for _, d in shown.nearest], np.sort(distances)[:6], rtol=1e-6)


def test_only_images_of_the_chosen_classes_are_shown(opened, finished_run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure4_drawing, "draw", lambda _, *panels: drawn.extend(panels))
    classes = opened.trained.dataset.manifest.classes
    given = ("--classes", classes[2].id, classes[7].name)
    figure4.run(options(figure4, tmp_path / "out", finished_run, *given), [])
    classified, retrieved = drawn
    pictures = [shown.picture for shown in classified] + [shown.query for shown in retrieved]
    found = [picture for shown in retrieved for picture, _ in shown.nearest]
    assert {picture.label for picture in pictures} == {picture.label for picture in found} == {2, 7}

    labels = opened.trained.dataset.reader("train").rows["label"]
    index = np.concatenate(cached_features(opened, "train", tmp_path / "out")).astype(float)
    for shown in retrieved:
        own = features(opened, opened.pixels("val", shown.query.number)).astype(float)
        order = np.sqrt(((index - own) ** 2).sum(1)).argsort()
        expected = [number for number in order if labels[number] in (2, 7)][:6]
        assert [picture.number for picture, _ in shown.nearest] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tench, Tinca tinca", "tench"),
        ("t-shirt (jersey, T-shirt, tee shirt)", "t-shirt"),
        ("soft-coated wheaten terrier", "soft-coated wheaten terrier"),
        ("(unknown)", "(unknown)"),
    ],
)
def test_the_first_name_of_a_class_is_whole(name, expected):
    assert figure4_drawing.short(name) == expected
    lines = figure4_drawing.wrapped(name, 18).split("\n")
    assert " ".join(lines) == expected
    assert max(map(len, lines)) <= 18


def test_names_and_probabilities_stay_within_the_bars_axes():
    names = ("American Staffordshire terrier", "West Highland white terrier", "cat", "dog", "hen")
    top = [
        (n, name, p) for n, (name, p) in enumerate(zip(names, (0.75, 0.2, 0.04, 0.009, 0.001), strict=True))
    ]
    figure = plt.figure(figsize=(1.6, 1.7))
    axes = figure.add_axes((0, 0, 1, 1))
    figure4_drawing.draw_bars(axes, Classified(Picture(0, 0, names[0], Image.new("RGB", (8, 8))), top))
    figure.canvas.draw()
    shown = [text.get_text() for text in axes.texts]
    assert shown == [part for _, name, p in top for part in (name, f"{p:.1%}")]
    for text in axes.texts:
        extent = text.get_window_extent()
        assert axes.bbox.x0 <= extent.x0 < extent.x1 <= axes.bbox.x1, text.get_text()
    plt.close(figure)


def test_an_images_classes_are_the_nets_largest_outputs(opened):
    shown = figure4.classify(opened, 4)
    with torch.inference_mode():
        outputs = opened.trained.model(opened.pixels("val", 4)).double().softmax(1)[0]
    assert [label for label, *_ in shown.top] == outputs.argsort(descending=True)[:5].tolist()
    assert sum(p for *_, p in shown.top) == pytest.approx(outputs.sort().values[-5:].sum().item(), rel=1e-5)
    assert shown.picture.label == opened.trained.dataset.reader("val").rows["label"][4]


def test_codes_are_compared_with_exact_search_and_baselines(finished_run, tmp_path):
    few = ("--bits", 8, 32, "--seeds", 2, "--epochs", 1, "--learn", 40, "--queries", 5)
    record = codes.run(options(codes, tmp_path / "out", finished_run, *few), [])
    exact, *coded = record.rows
    assert exact.system == "exact L2, 8,192 bytes per image"
    assert [row.than for row in coded if row.system.startswith("auto")] == [
        "signs of principal components, 8 bits",
        "signs of principal components, 32 bits",
    ]
    assert {len(values) for row in coded for values in row.measured.values()} == {2}
    # A hundred results from sixty images contain all of them.
    assert all(row.measured["recall of the 6 nearest in 100 results (%)"] == [100, 100] for row in coded)
    with Image.open(tmp_path / "out" / "codes.png") as image:
        image.load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("figure3", "nowhere"), "no run in nowhere"),
        (("figure3", "{run}", "{run}"), "is given 2 times: each run counts as a seed"),
        (("crops", "{run}", "{run}"), "is given 2 times"),
        (("figure3", "{run}", "--seeds", "3"), "unrecognized arguments: --seeds 3"),
        (("figure4", "{run}", "--images", "20"), "--images 20: the indices of validation images are 0 to 19"),
        (("figure4", "{run}", "--classes", "n99"), "--classes n99: the dataset has no such class"),
        (("figure4", "{run}", "--data", "{without}"), "has no split 'train', only val"),
        (("codes", "{run}", "--bits", "12"), "--bits 12: codes are whole bytes"),
        (("codes", "{run}", "--bits", "64"), "principal components need at least as many training images"),
        (("figure1", "--rates", "0.1", "-1"), "--rates: -1 is not a number above 0"),
        (("figure4", "{run}", "--seed", "-1"), "--seed: -1 is not a whole number of at least 0"),
        (("codes", "{run}", "--queries", "0"), "--queries: 0 is not a whole number of at least 1"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    arguments, message, finished_run, packed, tmp_path, monkeypatch, capsys
):
    without = tmp_path / "without"
    shutil.copytree(packed, without)
    manifest = read_manifest(without)
    write_manifest(without, manifest.model_copy(update={"splits": {"val": manifest.split("val")}}))
    given = [part.format(run=finished_run, without=without) for part in arguments]
    monkeypatch.setattr(sys, "argv", ["paper.py", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        paper.main()
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def test_a_run_of_another_net_is_refused(packed, tmp_path):
    folder = tmp_path / "run"
    Run(folder).begin(Settings(data=packed, net="nets:resnet"), read_manifest(packed)).close()
    with pytest.raises(SettingsError, match=f"{folder} has the net nets:resnet: .* need AlexNet"):
        open_net(folder)
