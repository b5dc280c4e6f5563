"""Pack image files into a dataset: find the images, check and convert them, and write the shards."""
