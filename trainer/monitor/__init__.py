"""How a run is monitored: metrics, the live page, the terminal display and the report."""
