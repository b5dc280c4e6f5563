"""The names of the project's packages, which are inside `alexnet_train` in a wheel; setup.py says why."""

ROOT = __name__.removesuffix("pipeline.names")  # what precedes them: nothing in a checkout
