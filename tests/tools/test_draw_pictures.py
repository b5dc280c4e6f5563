"""Drawn pictures: reproducible, with classes that need both colour and shape."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import draw_pictures
from tools.draw_pictures import HUES, SHAPES, SIDE, class_names, draw


def pixels(name: str, seed: int) -> np.ndarray:
    return np.asarray(draw(name, np.random.default_rng(seed)), float)


def silhouette(shape: str, seed: int) -> np.ndarray:
    """Return the pixels of the shape, which are those where the two hues of a drawing differ."""
    return np.abs(pixels(f"warm_{shape}", seed) - pixels(f"cold_{shape}", seed)).max(2) > 40


def draw_set(output: Path, seed: int, monkeypatch) -> dict[str, bytes]:
    arguments = ["--out", str(output), "--train", "2", "--val", "1", "--seed", str(seed)]
    monkeypatch.setattr(sys, "argv", ["draw_pictures.py", *arguments])
    draw_pictures.main()
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.JPEG")}


def test_the_ten_classes_are_every_shape_in_every_colour():
    assert len(set(class_names())) == len(class_names()) == 10
    assert {tuple(name.split("_")) for name in class_names()} == set(itertools.product(HUES, SHAPES))


def test_the_command_draws_each_class_of_each_split_from_the_seed(tmp_path, monkeypatch):
    first = draw_set(tmp_path / "a", 0, monkeypatch)
    counts = {name: len(list((tmp_path / "a").glob(f"{name}/*"))) for name in ("train/*", "val/*")}
    assert counts == {"train/*": 20, "val/*": 10}
    assert {Path(name).parts[1] for name in first} == set(class_names())
    assert len(set(first.values())) == 30  # no picture occurs twice, not even once in each split
    for path in (tmp_path / "a").rglob("*.JPEG"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))

    assert draw_set(tmp_path / "b", 0, monkeypatch) == first
    other = draw_set(tmp_path / "c", 1, monkeypatch)
    assert set(other) == set(first)
    assert not set(other.values()) & set(first.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_red_to_yellow_or_green_to_blue(shape):
    for seed in range(8):
        mask = silhouette(shape, seed)
        assert 0.02 < mask.mean() < 0.6
        warm, cold = (pixels(f"{hue}_{shape}", seed)[mask].mean(0) for hue in ("warm", "cold"))
        assert warm[0] > warm[2] + 20  # more red than blue
        assert cold[2] > cold[0] + 20


def test_the_five_shapes_have_different_outlines():
    for seed in range(8):
        outlines = {shape: silhouette(shape, seed) for shape in SHAPES}
        for one, other in itertools.combinations(outlines.values(), 2):
            assert (one & other).sum() < 0.9 * (one | other).sum()
        assert (outlines["ring"] & ~outlines["disc"]).sum() < 20  # pixels; only edges
        assert outlines["ring"].sum() < 0.9 * outlines["disc"].sum()


def test_the_mean_colour_does_not_determine_the_class():
    def mean_colours(seeds: range) -> np.ndarray:  # [classes, seeds, 3]
        seeded = itertools.product(enumerate(class_names()), seeds)
        means = [pixels(name, 1000 * label + seed).mean((0, 1)) for (label, name), seed in seeded]
        return np.reshape(means, (10, len(seeds), 3))

    centres = mean_colours(range(20)).mean(1)
    distances = np.linalg.norm(mean_colours(range(20, 40))[:, :, None] - centres, axis=-1)
    error = (distances.argmin(-1) != np.arange(10)[:, None]).mean()
    assert error > 0.65  # chance level is .9; the hue alone gives .8


def test_no_pixel_is_the_same_in_all_pictures():
    pictures = np.stack([pixels(name, seed) for seed, name in enumerate(class_names() * 4)])
    assert pictures.std(0).min() > 8
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.std(0).min() > 8  # the corners vary, too


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["draw-pictures", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=f"draw-pictures: {tmp_path}/file/train/.*: Not a directory"):
        draw_pictures.main()


def test_a_folder_that_is_drawn_in_part_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    drawn, real = itertools.count(1), draw_pictures.draw

    def interrupted(name, rng):
        if next(drawn) == 25:
            raise KeyboardInterrupt
        return real(name, rng)

    with monkeypatch.context() as patch:
        patch.setattr(draw_pictures, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw_set(tmp_path / "a", 0, patch)
    assert not (tmp_path / "a").exists()
    again = draw_set(tmp_path / "a", 0, monkeypatch)
    assert again == draw_set(tmp_path / "b", 0, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_pictures_of_a_run_that_was_killed_are_not_mixed_with_others(tmp_path, monkeypatch):
    partial = tmp_path / ".a.partial" / "train" / class_names()[0]
    partial.mkdir(parents=True)
    (partial / "rest.JPEG").touch()
    assert draw_set(tmp_path / "a", 0, monkeypatch) == draw_set(tmp_path / "b", 0, monkeypatch)


def test_pictures_can_be_drawn_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(draw_set(Path(), 0, monkeypatch)) == 30
