"""The images of the current batch: what is copied, when, and how it looks."""

import base64
import re
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import wait_until
from trainer.monitor import batch_view
from trainer.monitor.batch_view import IMAGES, BatchView, visible

LABELS = torch.arange(3)


def pixels(value: float) -> torch.Tensor:
    """Three images [3,3,4,6]: one with this value, and black and white ones around it."""
    return torch.stack([torch.full((3, 4, 6), each) for each in (value, -100.0, 100.0)])


@pytest.fixture
def view(monkeypatch) -> BatchView:
    monkeypatch.setattr(batch_view, "PATIENCE_SECONDS", 10.0)
    return BatchView()


def request(view: BatchView) -> tuple[threading.Thread, list[str]]:
    """Have a thread ask for the batch, as a page does, and return once it waits."""
    shown: list[str] = []
    thread = threading.Thread(target=lambda: shown.append(view.html(["cat", "<dog>"])))
    before = view._request
    thread.start()
    wait_until(lambda: view._request is not before)
    return thread, shown


def first_image(html: str) -> np.ndarray:
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", html)[1]
    return np.asarray(Image.open(BytesIO(base64.b64decode(data)))).astype(int)


def test_zero_is_grey_and_the_largest_value_is_not_clipped():
    values = np.zeros((1, 3, 1, 4), np.float32)
    values[0, 0] = [[0, -200, 100, 50]]
    (row,) = visible(values)[0]
    assert row[:, 0].tolist() == [128, 1, 192, 160]  # 128 + 127 · value / 200, rounded to even
    assert row[:, 1:].tolist() == [[128, 128]] * 4


def test_values_that_are_not_finite_and_flat_images_are_grey():
    values = np.full((1, 3, 2, 2), np.nan, np.float32)
    values[0, 0, 0] = np.inf, -np.inf
    assert (visible(values) == 128).all()
    assert (visible(np.zeros((1, 3, 2, 2), np.float32)) == 128).all()


def test_a_page_gets_the_images_of_the_step_that_follows_its_request(view):
    view.offer(pixels(-100.0), LABELS, 6, 0.5)  # before the request: not shown
    thread, shown = request(view)
    batch = pixels(50.0)
    view.offer(batch, LABELS, 41, 2.5)
    batch.fill_(-100.0)  # as a loader does when it uses its memory again
    thread.join()
    assert "images of step 42, after 2.50 epochs: 6 × 4 pixels with values from −100 to 100." in shown[0]
    assert re.findall("<figcaption>(.*?)</figcaption>", shown[0]) == ["cat", "&lt;dog&gt;", "class 2"]
    assert np.abs(first_image(shown[0]) - (128 + 127 * 50 / 100)).max() <= 2  # JPEG


def test_without_a_request_nothing_is_copied(view, monkeypatch):
    monkeypatch.setattr(batch_view, "_to_host", lambda _: pytest.fail("copied"))
    for step in range(3):
        view.offer(pixels(0.0), LABELS, step, 0.0)


def test_a_few_images_are_copied_once_for_several_pages(view, monkeypatch):
    copied, to_host = [], batch_view._to_host
    monkeypatch.setattr(batch_view, "_to_host", lambda values: copied.append(len(values)) or to_host(values))
    batch, labels = torch.zeros(20, 3, 4, 4), torch.zeros(20, dtype=torch.int64)
    thread, shown = request(view)
    others = [threading.Thread(target=lambda: shown.append(view.html([]))) for _ in range(5)]
    for other in others:
        other.start()
    for step in range(30):
        view.offer(batch, labels, step, 0.0)
    for each in (thread, *others):
        each.join()
    assert copied == [IMAGES, IMAGES]  # pixels and labels
    assert len(shown) == 6
    assert shown[0].count("<img") == IMAGES
    assert len({re.sub("class 0|cat", "", each) for each in shown}) == 1


def test_without_a_step_there_is_a_sentence_and_no_old_picture(view, monkeypatch):
    monkeypatch.setattr(batch_view, "INTERVAL_SECONDS", 0.0)
    thread, shown = request(view)
    view.offer(pixels(0.0), LABELS, 0, 0.0)
    thread.join()
    monkeypatch.setattr(batch_view, "PATIENCE_SECONDS", 0.05)
    assert "<img" in shown[0]
    assert view.html([]).startswith("<p>No picture: there was no training step")
    view.offer(pixels(0.0), LABELS, 1, 0.0)  # too late: nobody waits any more
    assert "<img" not in view.html([])
