"""List runs: find their folders, and show them as a table or as a page."""
