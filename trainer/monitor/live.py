"""The live page that the metrics server of a process serves at /: the process's metrics in a browser.

One response holds the whole page, including its style and script; the script requests it again every two
seconds. The page shows the most important values of /metrics, curves over the latest log intervals, and what
evaluations found. Images of the current batch come from /batch, which the script requests far less often.
"""

import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.duration import duration
from trainer.monitor.live_sections import sections
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.monitor.templates import template

_PAGE = template(Path(__file__).with_name("live.html"))
_WIDTH, _HEIGHT = 600, 90  # of a curve, in SVG units
_ABOUT = ("run", "recipe", "device", "precision")
_BATCH = """<section><h2>the current batch as the net sees it</h2>
<div id="batch"><p>waiting for a step</p></div></section>"""


def live_page(metrics: Metrics, show_images: bool = True) -> str:
    """Return the page as HTML. A value that does not exist yet is shown as a dash.

    show_images: whether there is a section for images of the current batch.
    """
    history, about = list(metrics.history), metrics.about
    last = history[-1] if history else None
    step, progress, epoch = (metrics.value(name) for name in ("step", "progress_ratio", "epoch"))
    with_top5 = not math.isnan(metrics.value("eval_error_ratio", k="5", protocol="centre"))
    return _PAGE.substitute(
        about=escape(" · ".join(about[name] for name in _ABOUT if name in about) or "starting"),
        rate=f"{last.images_per_second:,.1f}" if last else "–",
        verdict=last.verdict if last else "starting",
        percent=f"{progress:.1%}",
        position=f"epoch {epoch:.2f} · step {step:,.0f} · {progress:.1%}",
        left=_time_left(step, progress, history),
        tiles="\n".join(
            f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _tiles(metrics, last).items()
        ),
        rates=_curve([interval.images_per_second for interval in history]),
        losses=_curve([interval.loss for interval in history]),
        sections=sections(metrics.live, with_top5, epoch, last),
        batch=_BATCH if show_images else "",
    )


def _time_left(step: float, progress: float, history: Sequence[Interval]) -> str:
    """Estimate the remaining time from the mean duration of a step in the history."""
    if not history or not progress:
        return ""
    seconds = sum(interval.seconds for interval in history) / sum(interval.steps for interval in history)
    return f"{duration((step / progress - step) * seconds)} left"


def _tiles(metrics: Metrics, last: Interval | None) -> dict[str, str]:
    """Return the name and the value that each tile shows; a value that is not known yet is a dash."""
    saved = metrics.value("checkpoint_timestamp_seconds")
    return {
        "loss": f"{last.loss:.3f}" if last else "–",
        "training error": f"{last.error:.1%}" if last else "–",
        "input wait": f"{last.wait_ratio:.1%}" if last else "–",
        "learning rate": f"{metrics.value('learning_rate'):.2g}",
        "checkpoint": duration(time.time() - saved) + " ago" if saved else "–",
    }


def _curve(values: Sequence[float]) -> str:
    """Draw the finite values as an SVG curve from 0 to their maximum, which a label gives."""
    points = [(n, value) for n, value in enumerate(values) if 0 <= value < float("inf")]
    if len(points) < 2:
        return "<p>not enough data yet</p>"
    highest = max(value for _, value in points) or 1.0
    label = f"{highest:,.0f}" if highest >= 100 else f"{highest:.3g}"
    coordinates = " ".join(
        f"{n * _WIDTH / (len(values) - 1):.1f},{_HEIGHT * (1 - value / highest):.1f}" for n, value in points
    )
    return (
        f'<svg viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}" preserveAspectRatio="none" role="img">'
        f'<polyline points="{coordinates}"/></svg><p><span>0 to {label}</span>'
        f"<span>last {len(values)} intervals</span></p>"
    )
