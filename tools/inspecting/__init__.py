"""The parts of tools/inspect_shards.py."""
