"""tools/classify.py compared with the evaluation, on videos with known frames, and on broken files."""

import csv
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader import Dataset, Decoding, evaluation_loader
from pipeline.manifest import read_manifest
from pipeline.spec import NetSpec
from tests.videos import plain, write_video
from tools import classify
from tools.classifying import nets
from tools.classifying.output import Prediction
from tools.classifying.overlay import draw_bars
from tools.classifying.pictures import read, views
from tools.classifying.video import frames
from tools.make_shards import pack, parse_arguments
from trainer import checkpoint
from trainer.build import build_model
from trainer.evaluate import log_probabilities
from trainer.run import Run
from trainer.settings import Settings


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory) -> Path:
    """A run of a narrow, untrained net whose weights are large enough to give pictures different classes."""
    run = Run(tmp_path_factory.mktemp("trained") / "run")
    given = {"crop": 64, "preset": "code2012", "width": 0.125, "device": "cpu", "precision": "fp32"}
    settings = Settings.model_validate({"data": packed, "out": run.folder, **given})
    run.begin(settings, read_manifest(packed)).close()
    model = build_model(settings, len(read_manifest(packed).classes), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    checkpoint.write(run.checkpoints, 1, {"step": 1, "model": model.state_dict()}, keep=1)
    return run.folder


@pytest.mark.parametrize("crops", [1, 10])
def test_the_top_five_match_the_evaluation(crops, trained, packed, tmp_path, run_classify):
    dataset, folder = Dataset(packed), tmp_path / "val"
    reader = dataset.reader("val")
    folder.mkdir()
    for number in range(len(reader)):
        (folder / f"{number:02}.jpg").write_bytes(reader.jpeg(number).tobytes())
    output = tmp_path / "top.jsonl"
    code, _, _ = run_classify(folder, "--crops", crops, "--out", output, net=("--run", trained))
    assert code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(folder / f"{n:02}.jpg") for n in range(len(reader))]

    run = Run(trained)
    model = build_model(run.settings(), len(dataset.manifest.classes), torch.device("cpu"))
    model.load_state_dict(checkpoint.load(run.checkpoints, torch.device("cpu"))[0]["model"])
    batches = evaluation_loader(dataset, "val", 8, Decoding(crop=64), crops=crops)
    with torch.inference_mode():
        expected = torch.cat([log_probabilities(model.eval(), pixels).exp() for pixels, _ in batches])
    assert expected.max(1).values.mean() > 0.15  # far from uniform
    ids = [c.id for c in dataset.manifest.classes]
    for row, probabilities in zip(rows, expected, strict=True):
        found = {top["class"]: top["probability"] for top in row["top"]}
        assert len(found) == 5
        own = torch.tensor([found.get(name, torch.nan) for name in ids])
        among = ~own.isnan()
        # A few pixels of the two decoders differ by one of 256 levels.
        torch.testing.assert_close(own[among], probabilities[among], rtol=0, atol=0.005)
        assert probabilities[among].min() > probabilities[~among].max() - 0.005
        assert [g["probability"] for g in row["top"]] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("geometry", ["short256", "original"])
@pytest.mark.parametrize("crops", [1, 10])
def test_pictures_of_any_shape_are_cropped_as_in_the_evaluation(geometry, crops, oblong, tmp_path):
    arguments = ["--input", str(oblong), "--out", str(tmp_path), "--geometry", geometry]
    pack(parse_arguments([*arguments, "--size", "100", "--workers", "1"]).packing)
    dataset = Dataset(tmp_path)
    spec, reader = (
        NetSpec.from_manifest(dataset.manifest, 67),
        dataset.reader("val"),
    )  # an odd number of spare pixels
    [(pixels, _)] = evaluation_loader(dataset, "val", 10, Decoding(crop=67), crops=crops)
    for number, expected in enumerate(pixels.unflatten(0, (-1, 1)) if crops == 1 else pixels):
        with Image.open(BytesIO(reader.jpeg(number).tobytes())) as image:
            found = torch.from_numpy(views(image.convert("RGB"), spec, crops))
        difference = (found[:, None] - expected[None]).abs().mean((2, 3, 4))
        assert difference.min(1).values.max() < 0.6  # each of ours is one of theirs
        assert sorted(difference.argmin(1).tolist()) == list(range(crops))


def test_pictures_are_judged_by_content_and_rotated(tmp_path, run_classify):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain("blue", (64, 192)).save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").size == (192, 64)
    plain("red").convert("CMYK").save(tmp_path / "cmyk.jpg")
    plain("lime").save(tmp_path / "png.JPEG", "PNG")
    code, out, _ = run_classify(tmp_path)
    assert code == 0
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines[f"{tmp_path}/turned.jpg"].startswith("blue 9")
    assert lines[f"{tmp_path}/cmyk.jpg"].startswith("red 9")
    assert lines[f"{tmp_path}/png.JPEG"].startswith("green 9")


def test_broken_files_are_named_and_the_others_classified(tmp_path, run_classify, monkeypatch):
    monkeypatch.setattr(classify, "CHUNK", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, colour in enumerate(("red", "lime", "blue", "red")):
        plain(colour).save(folder / f"{number}.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (70, 80, 3), np.uint8)
    Image.fromarray(noise).save(folder / "1.jpg")
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "movie.mp4").write_bytes(b"\0" * 1000)
    (folder / "notes.txt").write_text("ignored")
    output, text = tmp_path / "top.csv", tmp_path / "notes.txt"
    text.write_text("read, because it was given by name")
    code, out, errors = run_classify(folder, text, "--out", output)
    assert (code, out) == (1, "")
    assert errors.splitlines() == [
        f"classify: {folder}/1.jpg: truncated",
        f"classify: {text}: not an image: it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, "
        "and its extension is not that of a video",
        f"classify: {folder}/movie.mp4: not a video: Invalid data found when processing input",
        "classify: 6 files, 3 failed; 1 other file skipped",
    ]
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows if row["rank"] == "1"] == ["red, ruby", "blue", "red, ruby"]
    assert len(rows) == 3 * 4
    assert rows[0]["file"] == f"{folder}/0.jpg"


def test_impossible_input_is_refused_in_one_line(tmp_path, run_classify, monkeypatch):
    plain("red").save(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    over = run_classify(tmp_path / "a.jpg", "--overlay", tmp_path)[0]
    assert over.startswith(
        f"classify: --overlay {tmp_path}: {tmp_path}/a.jpg would be written twice, or over an input: "
    )
    plain("blue").save(tmp_path / "empty" / "a.jpg")
    taken = run_classify(tmp_path / "empty", "--overlay", tmp_path)[0]
    refused = f"{tmp_path}/a.jpg exists: delete it, or choose another folder"
    assert taken == f"classify: --overlay {tmp_path}: {refused}"
    for wrong in (("--out", "top.txt"), ("--window", "nan"), ("--every", "0")):
        assert run_classify(tmp_path / "a.jpg", *wrong)[0] == 2
    monkeypatch.setattr(classify, "open_export", nets.open_export)
    net, picture = tmp_path / "net.onnx", tmp_path / "a.jpg"
    assert run_classify(picture, "--checkpoint", "best", net=("--net", net))[0] == 2
    missing = f"classify: no net at {net}. Export one: alexnet-train export RUN --out {net}"
    assert run_classify(picture, net=("--net", net))[0] == missing
    assert (
        f"--net {picture}: a net is an .onnx or .pt2 file" in run_classify(picture, net=("--net", picture))[0]
    )
    assert f"no run in {tmp_path}" in run_classify(picture, net=("--run", tmp_path))[0]


def test_a_windows_classes_are_the_mean_over_its_frames(tmp_path, run_classify):
    # At 10 frames/s: a second of red, one that is half green and half blue, and half a second of green.
    colours = ["red"] * 10 + ["lime"] * 5 + ["blue"] * 5 + ["lime"] * 5
    video = write_video(tmp_path / "film.mp4", [plain(colour) for colour in colours])
    output = tmp_path / "top.jsonl"
    assert run_classify(video, "--out", output)[0] == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["start_seconds"], row["end_seconds"], row["frames"]) for row in rows] == [
        (0, 1, 10),
        (1, 2, 10),
        (2, 3, 5),
    ]
    red, mixed, green = ({top["class"]: top["probability"] for top in row["top"]} for row in rows)
    assert red["n0"] > 0.95
    assert green["n1"] > 0.95
    # The net is sure of each frame's colour, so the mean of the softmax is a half for two colours.
    assert mixed["n1"] == pytest.approx(0.5, abs=0.04)
    assert mixed["n2"] == pytest.approx(0.5, abs=0.04)
    assert run_classify(video, "--out", output, "--every", "5", "--window", "10")[0] == 0
    [row] = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["frames"] == 5


def test_results_before_a_videos_damage_are_kept(tmp_path, run_classify):
    noise = np.random.default_rng(0).integers(0, 255, (30, 70, 80, 3), np.uint8)
    whole = write_video(tmp_path / "whole.mkv", [Image.fromarray(picture) for picture in noise]).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    code, out, errors = run_classify(cut)
    assert code == 1
    assert out.startswith(f"{cut} 0-1 s: ")
    assert (
        f"classify: {cut}: truncated: its last {len(whole) - len(whole) // 2:,} bytes are missing" in errors
    )


def test_overlays_show_pictures_and_videos_above_their_classes(tmp_path, run_classify):
    folder, drawn = tmp_path / "in", tmp_path / "drawn"
    (folder / "a").mkdir(parents=True)
    plain("red", (400, 300)).save(folder / "a" / "x.jpg")
    plain("blue", (100, 200)).save(folder / "x.png")
    write_video(folder / "film.avi", [plain("lime", (320, 240))] * 15)
    assert run_classify(folder, "--overlay", drawn)[0] == 0
    assert sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*.*")) == [
        "a/x.jpg",
        "film.avi.mp4",
        "x.png.jpg",
    ]
    with Image.open(drawn / "a/x.jpg") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape[1] == 400
    assert (abs(pixels[:295] - (254, 0, 0)) < 12).all()
    assert pixels[305:].mean() > 200  # bars on white
    shown = list(frames(drawn / "film.avi.mp4"))
    assert len(shown) == 15
    assert shown[-1][0] == pytest.approx(1.4, abs=0.01)
    assert shown[0][1].width == 320
    assert shown[0][1].height > 240


def test_a_bar_is_as_long_as_its_class_is_probable():
    predictions = [Prediction("n0", "red, ruby", 0.5), Prediction("n1", "w" * 200, 0.25)]
    bars = np.asarray(draw_bars(predictions, 400)).astype(int)
    lengths = [(bars[row].min(1) < 250).sum() for row in (9 + 3, 9 + 26 + 3)]  # above the letters
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=3)
    assert (bars[:, 330:340] > 250).all()  # a long name is cut off before the percentages
    assert (bars[:, 340:] < 100).any()


def test_an_export_needs_neither_torch_nor_the_trainer(tmp_path):
    code = (
        "import sys; from tools.classify import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print(sorted({'torch', 'trainer', 'nvidia', 'av'} & set(sys.modules)))"
    )
    (tmp_path / "net.onnx").write_text("not a net")
    plain("red").save(tmp_path / "a.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jpg"), "--net", str(tmp_path / "net.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    said, modules = done.stdout.splitlines()
    assert "is not a net" in said
    assert modules == "[]"
