"""From image files to shards: each image, each shard, many at once, and the dataset at the end."""
