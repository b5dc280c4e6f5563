"""Monitoring of a run: metrics, the live page, the terminal display, checks of numbers, and the report."""
