"""Write Grafana's dashboard for a run, docker/grafana/dashboards/alexnet.json.

    python docker/grafana/make_dashboard.py

Its first screen can be read from a distance; the rows below it give the reasons.
"""

import json
from pathlib import Path

import packing
import rows
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from panels import (
    GREEN,
    GREY,
    PURPLE,
    RATIO,
    SOURCE,
    VERMILLION,
    coloured,
    figure,
    figure_now,
    sized,
    words,
)

PATH = Path(__file__).parent / "dashboards/alexnet.json"
ROWS = {
    "Bottleneck": rows.bottleneck,
    "Learning": rows.learning,
    "GPU": rows.gpu,
    "Host": rows.host,
    "Run": rows.run,
    "Packing": packing.packing,
}
VERDICTS = {
    "mixed": GREY,
    "compute-bound": GREEN,
    "input-bound": VERMILLION,
    "host gap": PURPLE,
    "storage-bound": VERMILLION,
}


def first_screen() -> list:
    verdict = figure_now(
        "What limits it",
        'job:alexnet_verdict{job="$job"}',
        "none",
        "compute-bound: the device is busy 95 % of the time, the best case. input-bound: it waits 5 % of the "
        "time or more, and less than half of the batches are ready; more threads, a faster disk or smaller "
        "images help. storage-bound: the same, because shards arrive too slowly from the bucket. host gap: "
        "it is idle although batches are ready; a larger batch or --compile helps. mixed: none of these.",
        12,
        8,
    )
    return [
        sized(
            figure_now(
                "Images/s",
                'job:alexnet_images:rate1m{job="$job",phase="train"}',
                "none",
                "Training images over the last minute, of all processes.",
                12,
                8,
            ).decimals(0),
            140,
        ),
        sized(words(verdict, VERDICTS), 80),
        figure(
            "Epoch",
            'max(alexnet_epoch{job="$job"} > 0)',
            "none",
            "Completed passes over the training set.",
            5,
        ).decimals(2),
        figure_now(
            "Time left", 'job:alexnet_left:seconds{job="$job"}', "s", "At the pace of the last 15 minutes.", 5
        ),
        figure(
            "Top-1 error",
            'max(alexnet_eval_error_ratio{job="$job",k="1"})',
            RATIO,
            "Share of validation images whose most probable class is wrong.",
            5,
        ).decimals(1),
        figure(
            "Top-5 error",
            'max(alexnet_eval_error_ratio{job="$job",k="5"})',
            RATIO,
            "Share of validation images whose five most probable classes are all wrong.",
            5,
        ).decimals(1),
        coloured(
            figure_now(
                "Alerts",
                'count(ALERTS{alertstate="firing",job="$job"}) or vector(0)',
                "none",
                "Number of alerts firing for this run; the row Run names them.",
                4,
            ),
            {None: "text", 1: VERMILLION},
        ),
    ]


def variable(name: str, label: str, values: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(values)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def build() -> model.Dashboard:
    processes = variable("instance", "Process", 'label_values(alexnet_step{job="$job"}, instance)')
    whole = (
        dashboard.Dashboard("AlexNet training")
        .uid("alexnet")
        .description("One training run: how fast it is, what limits it, and what it learns.")
        .tags(["alexnet"])
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Run", "label_values(alexnet_step, job)"))
        .with_variable(
            processes.multi(True)
            .include_all(True)
            .all_value(".+")
            .current(model.VariableOption(text="All", value="$__all"))
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Starts")
            .datasource(SOURCE)
            .enable(True)
            .icon_color(PURPLE)
            # A process is marked for its first two minutes: annotations are queried a minute apart.
            .expr('time() - process_start_time_seconds{job="$job",instance=~"$instance"} < 120')
        )
    )
    for panel in first_screen():
        whole.with_panel(panel)
    for title, panels in ROWS.items():
        whole.with_row(dashboard.Row(title))
        for panel in panels():
            whole.with_panel(panel)
    built = whole.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def dashboard_json() -> str:
    return json.dumps(build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(dashboard_json())
