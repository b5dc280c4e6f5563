"""The experiments of tools/paper.py, one module each, and the modules they share."""

EXPERIMENTS = (  # in the order of the report
    "crops", "ensembles", "cnn-star", "baselines", "ablations",
    "figure1", "cifar10", "normalisation", "figure3", "figure4", "codes", "towers",
)  # fmt: skip
