"""Training: settings, loop, evaluation, checkpoints, metrics."""
