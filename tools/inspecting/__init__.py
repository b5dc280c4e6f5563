"""What inspect_shards.py is made of."""
