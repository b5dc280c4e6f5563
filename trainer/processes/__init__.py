"""The processes of a run: how they start, find each other, are watched and stop."""
