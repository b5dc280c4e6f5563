"""Parts of inspect_shards.py."""
