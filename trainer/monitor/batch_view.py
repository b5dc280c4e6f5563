"""Show a few images of the batch that a step trains on, when the live page asks for them.

A page's request waits until the training loop offers its next batch. The loop then queues a copy of the first
images, which is all that it does: it never waits for the copy, and without a request it copies nothing. The
thread that serves the page waits for the copy and encodes it, so a picture is complete, and of one step.
"""

import base64
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from html import escape
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.monitor.device_events import DeviceEvent

IMAGES = 8  # number of images that are shown
PATIENCE_SECONDS = 20.0  # how long a request waits for a step
INTERVAL_SECONDS = 10.0  # requests within this time after a picture get the same one


class _Copy(NamedTuple):
    """Images [n,3,h,w] and labels [n] on the host, complete once `done` is reached."""

    pixels: Tensor
    labels: Tensor
    done: DeviceEvent
    step: int
    epoch: float


class BatchView:
    """Passes images from the training loop to the threads that serve pages."""

    def __init__(self) -> None:
        self._request: Future[_Copy] = Future()
        self._request.cancel()  # no page waits yet
        self._lock = threading.Lock()  # held by the thread whose request waits
        self._html, self._made = "", -math.inf

    def offer(self, pixels: Tensor, labels: Tensor, step: int, epoch: float) -> None:
        """Copy the first images of a batch if a page waits for them.

        pixels: [n,3,h,w], as the net gets them. labels: [n]. step, epoch: numbers of steps and epochs done
        before this batch.
        """
        request = self._request
        if not request.done() and request.set_running_or_notify_cancel():
            images, classes = _to_host(pixels[:IMAGES]), _to_host(labels[:IMAGES])
            request.set_result(_Copy(images, classes, DeviceEvent(pixels.device), step, epoch))

    def html(self, names: Sequence[str]) -> str:
        """Return the images of the current batch as HTML, or a sentence if there is no step for a while.

        names: the names of the classes, by label.
        """
        if not self._lock.acquire(timeout=PATIENCE_SECONDS):
            return _NO_STEP
        try:
            if time.monotonic() >= self._made + INTERVAL_SECONDS:
                request: Future[_Copy] = Future()
                self._request = request
                wait([request], PATIENCE_SECONDS)
                if request.cancel():
                    return _NO_STEP
                self._html, self._made = _drawn(request.result(), names), time.monotonic()
            return self._html
        finally:
            self._lock.release()


def _drawn(copy: _Copy, names: Sequence[str]) -> str:
    copy.done.wait()
    values, labels = copy.pixels.float().numpy(), copy.labels.tolist()
    shown = [names[label] if label < len(names) else f"class {label}" for label in labels]
    figures = "".join(
        f'<figure><img src="{_as_url(image)}" alt=""><figcaption>{escape(name)}</figcaption></figure>'
        for image, name in zip(visible(values), shown, strict=True)
    )
    lowest, highest = (f"{value:.4g}".replace("-", "−") for value in (values.min(), values.max()))
    return (
        f"<p>The first {len(values)} images of step {copy.step + 1:,}, after {copy.epoch:.2f} epochs: "
        f"{values.shape[-1]} × {values.shape[-2]} pixels with values from {lowest} to "
        f"{highest}. Medium grey is 0, the mean that was subtracted.</p>"
        f'<div class="sheet">{figures}</div>'
    )


_NO_STEP = (
    f"<p>No picture: there was no training step within {PATIENCE_SECONDS:.0f} seconds. The run is starting, "
    "evaluating or saving, or it has ended.</p>"
)


def visible(values: np.ndarray) -> np.ndarray:
    """Map values [n,3,h,w] around 0 to RGB images, uint8 [n,h,w,3].

    0 becomes medium grey, and the largest absolute value in the batch becomes black or white, so nothing is
    clipped. Values that are not finite become 0.
    """
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    scale = 127.0 / max(float(np.abs(finite).max(initial=0.0)), 1e-6)
    return np.rint(128 + finite * scale).astype(np.uint8).transpose(0, 2, 3, 1)


def _to_host(values: Tensor) -> Tensor:
    """Queue a copy to the host's memory without waiting for it."""
    copy = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
    return copy.copy_(values, non_blocking=True)


def _as_url(image: np.ndarray) -> str:
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
