"""Videos, read and written with PyAV: upright frames, classes per time window, and an annotated copy."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import groupby, islice
from math import floor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tools.classifying.nets import BATCH, Net
from tools.classifying.output import Result, Window, best
from tools.classifying.overlay import draw_bars, reduced, with_bars
from tools.classifying.pictures import InputError, views

WHOLE = 0.9  # minimum fraction of the duration that must have frames: audio may outlast them
TICK = Fraction(1, 90000)  # seconds: the time base of the annotated copy

_ROUNDING = 1e-6

Frame = tuple[float, Image.Image]  # seconds from the first one, and RGB


def frames(path: Path, every: int = 1) -> Iterator[Frame]:
    """Yield every `every`th frame, rotated upright.

    Raises InputError if there is no frame or PyAV is missing, and for damage, after the readable frames.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{path} needs PyAV: pip install 'alexnet-train[video]'") from None
    seconds, period, broken = 0.0, 0.0, 0
    first = None
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InputError(f"{path}: it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            duration = (container.duration or 0) / av.time_base
            period = float(1 / (stream.average_rate or 25))
            for number, frame in enumerate(container.decode(stream)):
                time = number * period if frame.time is None else frame.time
                first = time if first is None else first
                seconds = time - first
                broken += frame.is_corrupt
                if number % every == 0 and not frame.is_corrupt:
                    yield seconds, _upright(frame.to_image(), frame.rotation)
    except av.FFmpegError as error:
        problem = f"damaged after {seconds:.1f} s" if first is not None else "not a video"
        raise InputError(f"{path}: {problem}: {error.strerror}") from None
    if first is None:
        raise InputError(f"{path}: it has no frames")
    if broken:
        raise InputError(f"{path}: damaged: {broken} broken frames were skipped")
    if seconds + period < WHOLE * duration:
        raise InputError(f"{path}: truncated: it has frames for {seconds:.1f} of {duration:.1f} s")


def _upright(image: Image.Image, degrees: int) -> Image.Image:
    """Rotate a frame counterclockwise by the angle that its metadata give, as telephones record it."""
    return image.rotate(degrees, expand=True) if degrees else image


def classify_video(path: Path, net: Net, crops: int, window: float, every: int) -> Iterator[Result]:
    """Yield a result for each window of `window` seconds: the mean softmax over its frames.

    Raises InputError, for damage after the results of the readable part.
    """
    damage = []

    def readable() -> Iterator[Frame]:
        try:
            yield from frames(path, every)
        except InputError as error:
            damage.append(error)

    for number, group in groupby(readable(), lambda frame: floor(frame[0] / window + _ROUNDING)):
        total, count = np.zeros(len(net.spec.classes)), 0
        while part := [views(image, net.spec, crops) for _, image in islice(group, BATCH)]:
            total += net.probabilities(np.stack(part)).sum(0)
            count += len(part)
        start = number * window
        yield Result(str(path), best(total / count, net.spec), Window(start, start + window, count))
    if damage:
        raise damage[0]


def annotate(path: Path, results: Sequence[Result], file: BinaryIO) -> None:
    """Write a copy as MP4 without audio, with the classes of its window below each frame."""
    import av

    starts = [result.window.start_seconds for result in results if result.window]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    bars: dict[int, Image.Image] = {}  # those of the current window, by its index
    stream = None
    with av.open(file, "w", format="mp4") as container:
        with suppress(InputError):  # damage was already reported with the results
            for seconds, original in frames(path):
                image = reduced(original)
                number = max(0, bisect_right(starts, seconds + _ROUNDING) - 1)
                if number not in bars:
                    bars = {number: draw_bars(results[number].top, image.width)}
                picture = with_bars(image, bars[number])
                if stream is None:
                    stream = container.add_stream(codec)
                    stream.width, stream.height = picture.size
                    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TICK
                frame = av.VideoFrame.from_image(picture.resize((stream.width, stream.height)))
                frame.pts, frame.time_base = round(seconds / TICK), TICK
                container.mux(stream.encode(frame))
        if stream:
            container.mux(stream.encode())
