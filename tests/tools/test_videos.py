"""Unusual but intact videos are read completely, and damaged ones as far as possible."""

import struct
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.videos import plain, write_silence, write_video
from tools.classifying import video
from tools.classifying.inputs import InputError
from tools.classifying.video import frames

ONE, WHOLE = 1 << 16, 1 << 30  # in the fixed-point numbers of a track's matrix
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def noise(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 48, 80, 3), np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        list(frames(path))
    assert str(refused.value).startswith(f"{path}: ")
    return str(refused.value).removeprefix(f"{path}: ")


def colour_at(image: Image.Image, x: float, y: float) -> str:
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, COLOURS[name], strict=True)))


# How (x, y) of the track is shown: (ax + cy, bx + dy). Expected: upper left, upper right, lower left, lower
# right, of a picture that is red, green, blue and white.
MATRICES = {
    "upright": ((1, 0, 0, 1), "red lime blue white"),
    "a quarter clockwise": ((0, 1, -1, 0), "blue red white lime"),
    "a half": ((-1, 0, 0, -1), "white blue lime red"),
    "a quarter anticlockwise": ((0, -1, 1, 0), "lime white red blue"),
    "mirrored": ((-1, 0, 0, 1), "lime red white blue"),
    "upside down": ((1, 0, 0, -1), "blue white red lime"),
    "mirrored at the diagonal": ((0, 1, 1, 0), "red blue lime white"),
    "mirrored at the other diagonal": ((0, -1, -1, 0), "white lime blue red"),
    "twice as large": ((2, 0, 0, 2), "red lime blue white"),
    "nothing": ((0, 0, 0, 0), "red lime blue white"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_rotated_and_mirrored_as_its_track_says(name, tmp_path):
    (a, b, c, d), expected = MATRICES[name]
    picture = plain("white", (80, 48))
    for place, colour in (((0, 0), "red"), ((40, 0), "lime"), ((0, 24), "blue")):
        picture.paste(plain(colour, (40, 24)), place)
    path = write_video(tmp_path / "film.mov", [picture] * 2)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    numbers = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, WHOLE)
    content[start : start + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(content)
    _, shown = next(frames(path))
    assert shown.size == ((80, 48) if a or name == "nothing" else (48, 80))
    corners = [colour_at(shown, x, y) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    assert corners == expected.split()


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv", "avi", "mts"])
def test_a_video_may_be_shorter_than_its_sound(extension, tmp_path):
    path = write_video(tmp_path / f"film.{extension}", [plain("red")] * 5, sound=3)
    assert len(list(frames(path))) == 5


@pytest.mark.parametrize(("extension", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("flv", "flv1")])
def test_a_video_whose_last_frame_lasts_long_is_not_called_truncated(extension, codec, tmp_path):
    path = write_video(
        tmp_path / f"film.{extension}", [plain("red")] * 3, codec=codec, times=[0, 0.1, 0.2], last=5
    )
    assert [round(seconds, 3) for seconds, _ in frames(path)] == [0, 0.1, 0.2]


@pytest.mark.parametrize(
    "times",
    [[0, 0.1, 2, 2.05, 9], [-0.2, -0.1, 0, 0.3, 0.4], [300, 300.1, 300.5, 301, 302]],
    ids=["variable rate", "negative", "late"],
)
def test_times_count_from_the_first_frame(times, tmp_path):
    path = write_video(tmp_path / "film.mkv", [plain("red")] * 5, times=times)
    expected = [round(time - times[0], 3) for time in times]
    assert [round(seconds, 3) for seconds, _ in frames(path)] == expected


def test_joined_recordings_of_different_sizes_follow_each_other(tmp_path):
    parts = [
        write_video(tmp_path / f"{size[0]}.mts", [plain("red", size)] * 10, codec="mpeg2video", rate=25)
        for size in ((80, 48), (128, 96))
    ]
    joined = tmp_path / "joined.mts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = list(frames(joined))
    assert {image.size for _, image in found} == {(80, 48), (128, 96)}
    times = [seconds for seconds, _ in found]
    assert np.diff(times) == pytest.approx(1 / 25, abs=1e-3)


@pytest.mark.parametrize("extension", ["mp4", "mkv", "avi"])
def test_metadata_that_are_not_utf_8_do_no_harm(extension, tmp_path):
    path = write_video(tmp_path / f"film.{extension}", [plain("red")] * 2, title="Strasse XY")
    content = path.read_bytes()
    assert b"Strasse XY" in content
    path.write_bytes(content.replace(b"Strasse XY", b"Stra\xdfe XYZ"))
    assert len(list(frames(path))) == 2


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv", "webm", "avi"])
def test_a_truncated_video_says_how_much_is_missing(extension, tmp_path):
    codec = "libvpx" if extension == "webm" else "mpeg4"
    path = write_video(tmp_path / f"film.{extension}", noise(20), codec=codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    problem = refusal(path)
    assert problem.startswith("truncated: its last ")
    missing = int(problem.split()[3].replace(",", ""))
    # An MP4 file's last part is its index, after the frames, and not counted if all of it is missing.
    assert 0 < missing <= len(content) - len(content) * 6 // 10


def test_frames_after_a_damaged_one_are_read(tmp_path):
    path = write_video(tmp_path / "film.mov", noise(30), codec="png")
    content = bytearray(path.read_bytes())
    header = content.index(b"IHDR", len(content) // 2)
    content[header : header + 40] = bytes(40)
    path.write_bytes(content)
    shown = frames(path)
    times = [seconds for seconds, _ in islice(shown, 29)]
    assert times[-1] == pytest.approx(2.9, abs=0.01)
    with pytest.raises(InputError, match="damaged: 1 broken frames were skipped"):
        next(shown)


def test_frames_too_large_or_too_elongated_are_not_decoded(tmp_path, monkeypatch):
    large = write_video(tmp_path / "large.avi", [plain("red")] * 2)
    monkeypatch.setattr(video, "MAX_PIXELS", 80 * 70 - 1)
    assert refusal(large) == "too large: 80×70 pixels"
    thin = write_video(tmp_path / "thin.avi", [plain("red", (16, 336))] * 2)
    monkeypatch.setattr(video, "MAX_PIXELS", 16 * 336)
    assert refusal(thin) == "too elongated: 16×336 pixels"


def write_sound(path: Path, cover: bool) -> Path:
    with av.open(path, "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            stream = container.add_stream("png")
            stream.width, stream.height, stream.pix_fmt = 80, 70, "rgb24"
            stream.disposition = av.stream.Disposition.attached_pic
            container.mux(stream.encode(av.VideoFrame.from_image(plain("red"))))
            container.mux(stream.encode())
        write_silence(container, audio, 0.5)
    return path


def test_files_without_frames_say_what_they_have(tmp_path):
    assert refusal(write_sound(tmp_path / "sound.mp4", cover=False)) == "it has no video stream"
    assert refusal(write_sound(tmp_path / "song.mp4", cover=True)) == "it has no video stream, only a cover"
    (tmp_path / "empty.mp4").touch()
    assert refusal(tmp_path / "empty.mp4") == "empty"
    unknown = write_video(tmp_path / "unknown.avi", [plain("red")] * 2)
    unknown.write_bytes(unknown.read_bytes().replace(b"FMP4", b"XYZ9"))
    assert "no decoder" in refusal(unknown)
    assert refusal(tmp_path / "none.mp4") == "No such file or directory"
