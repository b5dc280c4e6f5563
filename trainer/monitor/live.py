"""The live page at / of a process: its metrics for a person with a browser and nothing else.

The page is whole in one answer, with its style and script in it; the script asks for it again every
two seconds. It shows what /metrics shows, and the course of the last intervals.
"""

import re
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from pipeline.duration import duration
from trainer.monitor.meter import Interval

_PAGE = Template(Path(__file__).with_name("live.html").read_text(encoding="utf-8"))
_WIDTH, _HEIGHT = 600, 90  # of a curve, in units of its SVG
_ABOUT = ("run", "recipe", "device", "precision")


def live_page(exposition: str, history: Sequence[Interval]) -> str:
    """The page in HTML.

    exposition: the metrics as Prometheus reads them. history: the intervals to draw, oldest first.
    """
    samples = dict(line.rsplit(" ", 1) for line in exposition.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, value in samples.items()}
    info = next((name for name in values if name.startswith("alexnet_run_info")), "")
    about = dict(re.findall(r'(\w+)="([^"]*)"', info))
    last = history[-1] if history else None
    progress = values["alexnet_progress_ratio"]
    return _PAGE.substitute(
        about=escape(" · ".join(about[name] for name in _ABOUT if name in about) or "starting"),
        rate=f"{last.images_per_second:,.1f}" if last else "–",
        verdict=last.verdict if last else "starting",
        percent=f"{progress:.1%}",
        place=f"epoch {values['alexnet_epoch']:.2f} · step {values['alexnet_step']:,.0f} · {progress:.1%}",
        left=_left(values["alexnet_step"], progress, history),
        figures="\n".join(
            f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _figures(values, last).items()
        ),
        rates=_curve([interval.images_per_second for interval in history]),
        losses=_curve([interval.loss for interval in history]),
    )


def _left(step: float, progress: float, history: Sequence[Interval]) -> str:
    if not history or not progress:
        return ""
    seconds = sum(interval.seconds for interval in history) / sum(interval.steps for interval in history)
    return f"{duration((step / progress - step) * seconds)} left"


def _figures(values: dict[str, float], last: Interval | None) -> dict[str, str]:
    figures = {
        "loss": f"{last.loss:.3f}" if last else "–",
        "training error": f"{last.error:.1%}" if last else "–",
        "input wait": f"{last.wait_ratio:.1%}" if last else "–",
        "learning rate": f"{values['alexnet_learning_rate']:.2g}",
    }
    for k in (1, 5):
        error = values.get(f'alexnet_eval_error_ratio{{k="{k}",protocol="centre"}}')
        figures[f"validation top-{k} error"] = "–" if error is None else f"{error:.1%}"
    loss, saved = values['alexnet_loss{phase="eval"}'], values["alexnet_checkpoint_timestamp_seconds"]
    figures["validation loss"] = f"{loss:.3f}" if loss else "–"
    figures["since a checkpoint"] = duration(time.time() - saved) if saved else "–"
    return figures


def _curve(values: Sequence[float]) -> str:
    """An SVG of the finite values from 0 to their greatest, which it names."""
    points = [(n, value) for n, value in enumerate(values) if 0 <= value < float("inf")]
    if len(points) < 2:
        return "<p>nothing to draw yet</p>"
    greatest = max(value for _, value in points) or 1.0
    place = " ".join(
        f"{n * _WIDTH / (len(values) - 1):.1f},{_HEIGHT * (1 - value / greatest):.1f}" for n, value in points
    )
    return (
        f'<svg viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}" preserveAspectRatio="none" role="img">'
        f'<polyline points="{place}"/></svg><p><span>0 to {greatest:,.3g}</span>'
        f"<span>last {len(values)} intervals</span></p>"
    )
