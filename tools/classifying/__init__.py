"""The parts of tools/classify.py: opening nets, reading pictures and videos, writing and drawing results."""
