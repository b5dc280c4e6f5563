"""The live page as text and in a real browser."""

import os
import re
import shutil
import time
from xml.etree import ElementTree

import pytest
import torch
from playwright.sync_api import expect, sync_playwright

from trainer.monitor.live import live_page
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.monitor.server import MetricsServer

CPU = torch.device("cpu")


def interval(images_per_second: float, loss: float = 2.0) -> Interval:
    """An interval of ten steps in two seconds, limited by the model."""
    return Interval(
        10, round(2 * images_per_second), loss, 0.5, 2.0, wait_seconds=0.1, busy_seconds=1.95, ready=9
    )


def curve(text: str, name: str) -> list[tuple[float, float]]:
    """Return the points of the curve under a heading."""
    svg = re.search(rf"<h2>{name}</h2>(<svg.*?</svg>)", text)[1]
    points = ElementTree.fromstring(svg).find("polyline").get("points")
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_the_page_shows_the_metrics_of_the_run():
    metrics = Metrics()
    metrics.describe({"run": "runs/a<b>", "recipe": "paper", "device": "CPU", "precision": "fp32"})
    metrics.step.set(250)
    metrics.epoch.set(2.5)
    metrics.progress_ratio.set(0.25)
    metrics.record_interval(interval(1234.5), 0.01, 1.0, CPU)
    metrics.record_evaluation("centre", loss=1.25, top1_error=0.423, top5_error=0.187)
    text = live_page(metrics)
    assert "runs/a&lt;b&gt; · paper · CPU · fp32" in text
    for shown in (
        ">1,234.5 ",
        ">compute-bound<",
        "epoch 2.50 · step 250 · 25.0%",
        ">42.3%<",
        ">18.7%<",
        ">1.250<",
    ):
        assert shown in text
    assert "2 min 30 s left" in text  # 750 steps at 5 per second


def test_the_top5_error_has_a_tile_only_if_it_is_known():
    metrics = Metrics()
    for known in (None, 0.187):
        metrics.record_evaluation("centre", loss=1.25, top1_error=0.423, top5_error=known)
        text = live_page(metrics)
        assert "validation top-1 error" in text
        assert ("validation top-5 error" in text) == (known is not None)


def test_a_run_folder_of_any_name_is_shown_whole():
    metrics = Metrics()
    metrics.describe({"run": """runs/"a" & 'b' <script>alert(1)</script>"""})
    text = live_page(metrics)
    assert "runs/&quot;a&quot; &amp; &#x27;b&#x27; &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script>alert" not in text


def test_a_curve_runs_from_zero_to_its_maximum():
    metrics = Metrics()
    for rate in (100.0, 50.0, 200.0):
        metrics.record_interval(interval(rate), 0.01, 1.0, CPU)
    (x0, y0), (_, y1), (x2, y2) = curve(live_page(metrics), "images/s")
    assert (x0, x2, y2) == (0, 600, 0)
    assert (y0, y1) == (45, 67.5)  # of a height of 90: half and three quarters of the way down


def test_a_loss_that_is_not_finite_leaves_a_gap_in_the_curve():
    metrics = Metrics()
    for loss in (2.0, float("nan"), float("inf"), 1.0):
        metrics.record_interval(interval(100, loss), 0.01, 1.0, CPU)
    assert [x for x, _ in curve(live_page(metrics), "loss")] == [0, 600]


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "CI has to install chromium"
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield launched
        launched.close()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_a_browser_sees_values_change_and_contacts_no_other_host(browser, scheme, dark):
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0, 900.0)
    try:
        tab = browser.new_page(color_scheme=scheme)
        requests, errors = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        metrics.record_interval(interval(111.5), 0.01, 1.0, CPU)
        tab.goto(f"http://127.0.0.1:{server.port}/")
        assert "111.5" in tab.inner_text(".rate")
        metrics.record_interval(interval(222.5), 0.01, 1.0, CPU)
        expect(tab.locator(".rate")).to_contain_text("222.5")
        assert tab.title().startswith("222.5 images/s")
        assert set(requests) == {f"http://127.0.0.1:{server.port}/"}
        assert errors == []
        ground, ink = (
            tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert (brightness(ground) < brightness(ink)) == dark
        assert abs(brightness(ground) - brightness(ink)) > 150  # of 255
    finally:
        server.close()
    expect(tab.locator("#no-response")).to_contain_text("No response since")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("seconds", [13, 59 * 60 + 59, 36_000])
def test_every_value_fits_on_one_line_of_its_tile(browser, width, seconds):
    metrics = Metrics()
    metrics.checkpoint_timestamp.set(time.time() - seconds)
    metrics.record_evaluation("centre", loss=1.25, top1_error=0.423, top5_error=0.187)
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.set_content(live_page(metrics))
    size = "value => [value.offsetHeight, value.clientWidth - value.scrollWidth]"
    tiles = tab.evaluate(f"[...document.querySelectorAll('dd')].map({size})")
    assert len(tiles) == 8
    assert len({height for height, _ in tiles}) == 1
    assert all(room >= 0 for _, room in tiles)


def brightness(colour: str) -> float:
    """Return the brightness of a CSS rgb() colour, 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
