"""Train the four-layer net of section 3.3 with and without response normalisation across maps.

    alexnet-train paper normalisation --data shards --jobs 2

The paper reports test errors on CIFAR-10 of 13 % without normalisation and 11 % with it, and refers to
cuda-convnet for both nets. This is the first of them, layers-conv-local-13pct, and the same net with the
normalisation of the second. They learn random crops of 24 px and their reflections. Their test error is that
of the softmax averaged over ten views: the centre, the corners and their reflections. Images are kept in
memory, 3 KB each. The state is saved after each epoch: finished runs are not repeated, and interrupted ones
resume.
"""

import argparse

from pipeline.messages import pluralize
from tools.experiments.cifar10 import TEST, add_common_arguments, curves, measures, trained
from tools.experiments.record import Record, Row
from tools.experiments.training import describe
from tools.options import add_seeds

TAKES_SETTINGS = False
WITHOUT, WITH = "without normalisation", "with normalisation"  # names of recipes
EPOCHS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, EPOCHS)
    add_seeds(parser, 5)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Train the runs that are not finished, and draw the figure. Raises DatasetError or TrainingError."""
    outcomes, about = trained(options, "normalisation", [WITHOUT, WITH])
    figure = curves(options.out / "normalisation.png", outcomes, {WITHOUT: 13, WITH: 11})
    return Record(
        experiment="normalisation",
        title="CIFAR-10 with and without response normalisation",
        source="section 3.3: 13 % without normalisation, 11 % with it",
        data=f"{describe(options.data)}; random crops of 24 px and reflections, tested on ten views; batch "
        f"128, learning rates .001, divided by 10 after 8 and 9 tenths of {options.epochs} epochs, and for "
        f"biases .002 throughout, {pluralize(options.seeds, 'seed', 'seeds')}",
        rows=[
            Row(
                system=WITHOUT,
                **measures(outcomes[WITHOUT]),
                published={TEST: 13},
                claims={TEST: "A four-layer net for CIFAR-10, without normalisation (3.3)"},
            ),
            Row(
                system=WITH,
                **measures(outcomes[WITH]),
                published={TEST: -2},
                than=WITHOUT,
                claims={TEST: "Response normalisation lowers the error on CIFAR-10 (3.3)"},
            ),
        ],
        figures=[figure],
        remarks=[
            "The paper refers to cuda-convnet, whose nets are layers-conv-local-13pct and -11pct: two "
            "convolutions, two locally connected layers and a softmax. Both nets here are the first one, to "
            "which the second adds only the normalisation of layers-conv-local-11pct: over 9 maps, with "
            "α = .001/9, β = .75 and k = 1. The published net with normalisation also had 64 kernels instead "
            "of 32 in its third layer.",
            "The published net with normalisation was trained for some 500 epochs, with lower rates in the "
            f"last 20; these nets for {options.epochs}. All other settings are those of the files.",
        ],
        **about,
    )
