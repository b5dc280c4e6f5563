"""What verify_shards.py is made of."""
