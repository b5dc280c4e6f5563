"""Compare ten crops with the centre crop.

The ten crops are the four corners and the centre with their mirror images; their softmax is averaged.

    alexnet-train paper crops runs/a runs/b

Each run gives one value, so runs should differ only in their seeds. The published errors
come from the code's log on ILSVRC-2010's test images.
"""

import argparse

from tools.experiments import finished
from tools.experiments.record import TOP1, TOP5, Record, Row, Wrong

TAKES_SETTINGS = False
CENTRE, TEN = "centre crop", "ten crops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser, several=True)
    finished.add_split(parser)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Evaluate each run both ways. Raises what `open_runs` and `errors_of` raise."""
    opened = finished.open_runs(options, options.split)
    from tools.experiments.predictions import errors_of, wrong

    def measured(crops: int) -> dict[str, Wrong]:
        return wrong([errors_of(net, options.split, crops, options.out) for net in opened])

    return Record(
        experiment="crops",
        title="Ten crops",
        source="section 4.1; the log of layers-145 on ILSVRC-2010",
        rows=[
            Row(system=CENTRE, wrong=measured(1), published={TOP1: 39.0, TOP5: 18.3}),
            Row(
                system=TEN,
                wrong=measured(10),
                published={TOP1: -1.6, TOP5: -1.3},
                than=CENTRE,
                claims={TOP1: "With ten crops instead of one, the error is lower (4.1)"},
            ),
        ],
        **opened[0].about(*opened[1:]),
    )
