"""What a run shows of itself: metrics, the live page, the terminal, the report."""
