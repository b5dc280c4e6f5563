"""Load batches of augmented images from a packed dataset: manifest, shards, plan, graph and loader."""
