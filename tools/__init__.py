"""Commands around the trainer: packing, measuring, drawing."""
