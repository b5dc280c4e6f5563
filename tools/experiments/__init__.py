"""The experiments of tools/paper.py, a module each, and what they share."""
