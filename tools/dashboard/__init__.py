"""The rows and panels of the dashboard that make_dashboard.py writes."""
