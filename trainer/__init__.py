"""Training: settings, the training loop, evaluation, checkpoints and metrics."""
