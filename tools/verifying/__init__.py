"""Parts of verify_shards.py."""
