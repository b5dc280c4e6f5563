"""Pack image files into shards: find the images, check and convert them, and write the dataset."""
