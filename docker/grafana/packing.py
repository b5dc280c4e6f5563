"""The dashboard's row on packing, which shows all packing runs, whichever training run is chosen."""

from functools import partial

from panels import RATIO, curves


def packing() -> list:
    each = "{{instance}}"
    graph = partial(curves, otherwise="nothing is being packed with --metrics-port")
    return [
        graph(
            "Images packed/s",
            {each: "rate(alexnet_pack_images_total[$__rate_interval])"},
            "none",
            "If it is low while the CPUs are idle, the input or the output is the limit.",
        ),
        graph(
            "Data packed",
            {each: "rate(alexnet_pack_bytes_total[$__rate_interval])"},
            "Bps",
            "JPEG bytes written to shards. At the limit of disk or network, more workers do not help.",
        ),
        graph(
            "Images rejected",
            {each: "increase(alexnet_pack_rejected_total[$__rate_interval])"},
            "none",
            "report.tsv lists them with their reasons.",
        ),
        graph(
            "Packing progress",
            {each: "alexnet_pack_progress_ratio"},
            RATIO,
            "Fraction of the planned images that is done, including that of earlier runs.",
        ),
        graph(
            "Planned images",
            {each: "alexnet_pack_planned_images"},
            "none",
            "All images of the dataset, known once the input has been listed.",
        ),
        graph(
            "Packing time left",
            {each: "alexnet_pack_left_seconds"},
            "s",
            "At the rate of the last half minute.",
        ),
    ]
