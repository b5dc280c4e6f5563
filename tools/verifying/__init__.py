"""The parts of tools/verify_shards.py: checking a shard, and describing what was found."""
