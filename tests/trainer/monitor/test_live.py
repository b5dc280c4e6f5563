"""The live page as text and in a real browser."""

import re
import time
from xml.etree import ElementTree

import pytest
import torch
from playwright.sync_api import expect

from tests.run_folders import write_run
from trainer.monitor.comparison import Earlier
from trainer.monitor.live import live_page
from trainer.monitor.live_data import ErrorsByClass
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.monitor.server import MetricsServer
from trainer.monitor.summary import read_summary

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
    text = live_page(metrics)
    assert "runs/a&lt;b&gt; · paper · CPU · fp32" in text
    for shown in (">1,234.5 ", ">compute-bound<", "epoch 2.50 · step 250 · 25.0%", ">2.000<", ">50.0%<"):
        assert shown in text
    assert "2 min 30 s left" in text  # 750 steps at 5 per second
    assert "validation" not in text  # until there is an evaluation


def evaluated(metrics: Metrics, errors: list[float], top5_error: float | None = None) -> None:
    """Record an evaluation after each epoch, as the journal does."""
    metrics.live.evaluations = [
        {"epoch": epoch, "top1_error": error, "top5_error": top5_error or 0.0, "loss": 2 * error}
        for epoch, error in enumerate(errors, 1)
    ]
    metrics.record_evaluation("centre", loss=0.0, top1_error=errors[-1], top5_error=top5_error)


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    section = re.search(rf"<h2>{re.escape(heading)}</h2><table>.*?</table>", text)[0]
    rows = re.findall("<tr>(.*?)</tr>", section)
    return [re.findall(r"<t[hd][^>]*>(?:<div.*?</div>)?(.*?)</t[hd]>", row) for row in rows]


@pytest.mark.parametrize("top5_error", [None, 0.125])
def test_the_last_and_the_best_evaluation_are_shown(top5_error):
    metrics = Metrics()
    evaluated(metrics, [0.5, 0.25, 0.375], top5_error)
    rows = table(live_page(metrics), "evaluations")
    top5 = [] if top5_error is None else ["12.50%"]  # with few classes, it is not known
    assert rows == [
        ["evaluation", "after", "top-1 error", *["top-5 error"] * len(top5), "loss"],
        ["last", "3.00 epochs", "37.50%", *top5, "0.750"],
        ["best", "2.00 epochs", "25.00%", *top5, "0.500"],
    ]


def test_the_classes_with_the_highest_errors_are_shown():
    metrics = Metrics()
    metrics.live.names = ["cat", "<b>dog</b>", "none", "owl"]
    metrics.live.class_errors = ErrorsByClass(3.0, [4, 10, 0, 8], [1, 9, 0, 2])
    assert table(live_page(metrics), "errors by class, after 3.00 epochs") == [
        ["class", "", "top-1 error"],
        ["&lt;b&gt;dog&lt;/b&gt;", "", "90.0% of 10"],
        ["owl", "", "25.0% of 8"],
        ["cat", "", "25.0% of 4"],
    ]
    metrics.live.names = [f"class {label}" for label in range(1000)]
    metrics.live.class_errors = ErrorsByClass(1.0, [100] * 1000, [label % 100 for label in range(1000)])
    rows = table(live_page(metrics), "errors of the 20 worst of 1,000 classes, after 1.00 epochs")
    assert [row[0] for row in rows[1:3]] == ["class 99", "class 199"]
    assert len(rows) == 21


def test_an_earlier_run_is_compared_at_the_same_epoch(tmp_path):
    metrics = Metrics()
    earlier = write_run(tmp_path / "<old>", [0.5, 0.25, 0.125], is_finished=True)
    metrics.live.earlier = Earlier(read_summary(earlier), "seed is 1 instead of 0")
    metrics.record_interval(interval(1234.5), 0.01, 1.0, CPU)
    metrics.epoch.set(2.5)
    evaluated(metrics, [0.5, 0.375])
    text = live_page(metrics)
    assert table(text, "compared with &lt;old&gt;") == [
        ["measure", "this\u00a0run", "earlier\u00a0run"],
        ["training loss after 2.50 epochs", "2.000", "2.800"],
        ["top-1 error after 2.00 epochs", "37.50%", "25.00%"],
        ["best top-1 error", "37.50%", "12.50%, after 3.00 epochs"],
        ["images/s (earlier run: median)", "1,234.5", "200.0"],
    ]
    assert "recipe demo, finished. Here, seed is 1 instead of 0.</p>" in text


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
        tab.evaluate("document.querySelector('#values').innerHTML = ''")  # the page fills it again
        expect(tab.locator(".rate")).to_contain_text("222.5")
        for step in range(200):  # until the page's request has been answered
            metrics.live.batch.offer(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), step, 0.0)
            if tab.locator(".sheet img").count() == 2:
                break
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth === 8)")
        assert set(requests) == {f"http://127.0.0.1:{server.port}/{path}" for path in ("", "batch")}
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
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.set_content(live_page(metrics))
    size = "value => [value.offsetHeight, value.clientWidth - value.scrollWidth]"
    tiles = tab.evaluate(f"[...document.querySelectorAll('dd')].map({size})")
    assert len(tiles) == 5
    assert len({height for height, _ in tiles}) == 1
    assert all(room >= 0 for _, room in tiles)


def brightness(colour: str) -> float:
    """Return the brightness of a CSS rgb() colour, 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_fit_into_the_page(browser, tmp_path, width):
    metrics = Metrics()
    metrics.describe({"run": "runs/" + "x" * 200})
    metrics.live.names = ["Dreizehnbuchstabig" * 4, "two words " * 9]
    metrics.live.class_errors = ErrorsByClass(3.0, [1_000_000] * 2, [999_999, 3])
    metrics.live.earlier = Earlier(read_summary(write_run(tmp_path / ("y" * 200), [0.5, 0.25])), "z" * 300)
    metrics.record_interval(interval(123_456.7), 0.01, 1.0, CPU)
    metrics.epoch.set(2.0)
    evaluated(metrics, [0.5, 0.375], 0.125)
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.set_content(live_page(metrics))
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("polyline").count() == 2
