"""The parts of tools/export.py that need torch."""
