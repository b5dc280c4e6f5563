"""Read and write videos with PyAV: upright frames, classes per time window, and an annotated copy."""

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import groupby, islice
from math import atan2, degrees, floor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from pipeline.packing.images import MAX_ASPECT, MAX_PIXELS
from pipeline.printable import as_text, in_line
from tools.classifying.inputs import InputError, errors_of
from tools.classifying.nets import BATCH, Net
from tools.classifying.output import Result, Window, best
from tools.classifying.overlay import draw_bars, reduced, with_bars
from tools.classifying.pictures import views
from tools.classifying.truncation import missing_bytes

TICK = Fraction(1, 90000)  # time base of the annotated copy, in seconds
_ROUNDING = 1e-6  # tolerance of comparisons of times, in seconds or windows

Frame = tuple[float, Image.Image]  # seconds from the first one, and RGB


class _VideoError(ValueError):
    """A problem of a video; the message does not name the video."""


def frames(path: Path, every: int = 1) -> Iterator[Frame]:
    """Yield every `every`th frame, rotated and mirrored as the file says; broken frames are skipped.

    Raises InputError if there is no frame, if frames are too large, if PyAV is missing or, after the readable
    frames, if the file is damaged. Raises OSError if the storage is unavailable.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{in_line(path)} needs PyAV: pip install 'alexnet-train[video]'") from None
    with errors_of(path), open(path, "rb") as file:
        if file.seekable() and not path.stat().st_size:
            raise InputError(f"{in_line(path)}: empty")
        missing, problem, seconds = missing_bytes(file), "", 0.0
        try:
            for seconds, image in _readable_frames(file, every):
                yield seconds, image
        except _VideoError as error:
            problem = str(error)
        except (av.FFmpegError, OSError) as error:
            # EINVAL means that a damaged file made FFmpeg seek to an offset before its start.
            if not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
                raise
            problem = f"damaged after {seconds:.1f} s: {error.strerror}"
        if missing:
            problem = f"truncated: its last {missing:,} bytes are missing"
        if problem:
            raise InputError(f"{in_line(path)}: {problem}")


def _readable_frames(file: BinaryIO, every: int) -> Iterator[Frame]:
    """Yield as `frames` does. Raises _VideoError or FFmpegError."""
    import av

    try:
        container = av.open(file, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _VideoError(f"not a video: {error.strerror}") from None
    with container:
        stream = _moving_pictures(container)
        clock = _Clock(float(1 / (stream.average_rate or 25)))
        number, broken, reason = 0, 0, ""
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:  # the next packet may be intact
                broken, reason = broken + 1, reason or error.strerror
                continue
            for frame in decoded:
                seconds = clock.seconds_at(frame.time)
                if frame.is_corrupt:
                    broken += 1
                elif number % every == 0:
                    _check_size(frame.width, frame.height)
                    yield seconds, _upright(frame.to_image(), frame.side_data.get("DISPLAYMATRIX"))
                number += 1
    if not number:
        raise _VideoError(f"no frame can be decoded: {reason}" if reason else "it has no frames")
    if broken:
        raise _VideoError(f"damaged: {broken} broken frames were skipped")


def _moving_pictures(container: Any) -> Any:
    """Return the first video stream that is not a cover picture. Raises _VideoError."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise _VideoError("it has no video stream" + (", only a cover" if container.streams.video else ""))
    stream = streams[0]
    if stream.codec_context is None:
        raise _VideoError("this build of FFmpeg has no decoder for it")
    _check_size(stream.codec_context.width, stream.codec_context.height)
    stream.thread_type = "AUTO"
    return stream


def _check_size(width: int, height: int) -> None:
    """Refuse sizes that are refused for pictures, before memory is allocated. Raises _VideoError."""
    if width * height > MAX_PIXELS:
        raise _VideoError(f"too large: {width}×{height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _VideoError(f"too elongated: {width}×{height} pixels")


class _Clock:
    """Turns the timestamps of a video's frames into seconds since the first one.

    In joined recordings, time begins anew at the second one, and some formats have no timestamps. In both
    cases, a frame is one period later than the previous one. period: 1 / frame rate, in seconds.
    """

    def __init__(self, period: float):
        self.period, self.seconds = period, -period
        self.start: float | None = None  # timestamp of second 0

    def seconds_at(self, timestamp: float | None) -> float:
        following = self.seconds + self.period
        if timestamp is None:
            self.seconds = following
        else:
            if self.start is None or timestamp - self.start < self.seconds:
                self.start = timestamp - following
            self.seconds = timestamp - self.start
        return self.seconds


def _upright(image: Image.Image, matrix: Any) -> Image.Image:
    """Mirror and rotate a frame as its display matrix says.

    matrix: nine numbers of FFmpeg (a, b, u, c, d, v, x, y, w) that map a pixel (p, q) to (ap + cq, bp + dq),
    or None. A phone records one if it is held upright, or to mirror the picture of its front camera.
    """
    if matrix is None:
        return image
    a, b, _, c, d, *_ = map(float, np.frombuffer(matrix, np.int32))
    if a * d < b * c:
        image = ImageOps.mirror(image)
    # Mirroring leaves the vertical axis as it is, so the angle of its image is that of the rotation.
    clockwise = degrees(atan2(-c, d))
    return image.rotate(-clockwise, expand=True) if clockwise else image


def classify_video(path: Path, net: Net, crops: int, window: float, every: int) -> Iterator[Result]:
    """Yield a result for each window of `window` seconds: the mean softmax output over its frames.

    Raises InputError; in the case of damage, after the results of the readable part.
    """
    damage = []

    def readable_views() -> Iterator[tuple[float, np.ndarray]]:
        try:
            with errors_of(path):
                for seconds, image in frames(path, every):
                    yield seconds, views(image, net.spec, crops)
        except InputError as error:
            damage.append(error)

    for number, group in groupby(readable_views(), lambda frame: floor(frame[0] / window + _ROUNDING)):
        total, count = np.zeros(len(net.spec.classes)), 0
        while part := [view for _, view in islice(group, BATCH)]:
            total += net.probabilities(np.stack(part)).sum(0)
            count += len(part)
        start = number * window
        yield Result(as_text(path), best(total / count, net.spec), Window(start, start + window, count))
    if damage:
        raise damage[0]


def annotate(path: Path, results: Sequence[Result], file: BinaryIO) -> None:
    """Write a copy as MP4 without audio, with the classes of its window below each frame."""
    import av

    starts = [result.window.start_seconds for result in results if result.window]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    drawn: tuple[int, int] | None = None  # the window and the width of the current bars
    stream, ticks = None, -1
    with av.open(file, "w", format="mp4") as container:
        with suppress(InputError):  # damage was already reported with the results
            for seconds, original in frames(path):
                image = reduced(original)
                number = max(0, bisect_right(starts, seconds + _ROUNDING) - 1)
                if drawn != (number, image.width):
                    drawn, bars = (number, image.width), draw_bars(results[number].top, image.width)
                picture = with_bars(image, bars)
                if stream is None:
                    stream = container.add_stream(codec)
                    stream.width, stream.height = picture.size
                    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TICK
                frame = av.VideoFrame.from_image(picture.resize((stream.width, stream.height)))
                ticks = max(round(seconds / TICK), ticks + 1)
                frame.pts, frame.time_base = ticks, TICK
                container.mux(stream.encode(frame))
        if stream:
            container.mux(stream.encode())
