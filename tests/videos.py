"""Pictures and short videos with known content."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

MILLISECOND = Fraction(1, 1000)
SOUND_RATE = 16000  # samples per second


def plain(colour: str, size: tuple[int, int] = (80, 70)) -> Image.Image:
    return Image.new("RGB", size, colour)


def write_video(
    path: Path,
    pictures: list[Image.Image],
    rate: int = 10,
    *,
    codec: str = "mpeg4",
    times: Sequence[float] | None = None,
    last: float | None = None,
    sound: float = 0,
    title: str = "",
) -> Path:
    """Write a video, whose extension chooses its format.

    times: timestamps in seconds; without them, the frames are evenly spaced. last: how long the last frame
    stands, in seconds. sound: seconds of silence beside the pictures.
    """
    with av.open(path, "w", options={"avoid_negative_ts": "disabled"}) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        stream.bit_rate = 2_000_000
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            if times is not None:
                frame.pts, frame.time_base = round(times[number] / MILLISECOND), MILLISECOND
            for packet in stream.encode(frame):
                if last is not None and number == len(pictures) - 1:
                    packet.duration = round(last / packet.time_base)
                container.mux(packet)
        container.mux(stream.encode())
        if audio:
            write_silence(container, audio, sound)
    return path


def write_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * SOUND_RATE), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = SOUND_RATE, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
