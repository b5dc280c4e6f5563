"""The dashboard's row on packing, which shows all packing runs, whichever training run is chosen."""

from panels import RATIO, curves

NO_PACKING = "nothing is being packed with --metrics-port"


def packing() -> list:
    each = "{{instance}}"
    return [
        curves(
            "Images packed/s",
            {each: "rate(alexnet_pack_images_total[$__rate_interval])"},
            "none",
            "If it is low while the CPUs are idle, the input or the output is the limit.",
            otherwise=NO_PACKING,
        ),
        curves(
            "Data packed",
            {each: "rate(alexnet_pack_bytes_total[$__rate_interval])"},
            "Bps",
            "JPEG bytes written to shards. At the limit of disk or network, more workers do not help.",
            otherwise=NO_PACKING,
        ),
        curves(
            "Images rejected",
            {each: "increase(alexnet_pack_rejected_total[$__rate_interval])"},
            "none",
            "report.tsv lists them with their reasons.",
            otherwise=NO_PACKING,
        ),
        curves(
            "Packing progress",
            {each: "alexnet_pack_progress_ratio"},
            RATIO,
            "Fraction of the planned images that is done, including that of earlier runs.",
            otherwise=NO_PACKING,
        ),
        curves(
            "Planned images",
            {each: "alexnet_pack_planned_images"},
            "none",
            "All images of the dataset, known once the input has been listed.",
            otherwise=NO_PACKING,
        ),
        curves(
            "Packing time left",
            {each: "alexnet_pack_left_seconds"},
            "s",
            "At the rate of the last half minute.",
            otherwise=NO_PACKING,
        ),
    ]
