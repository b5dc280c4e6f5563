"""From a packed dataset to batches of augmented images: manifest, shards, plan, graph, loader."""
