"""The processes of a run: launching, communication, watchdog and stopping."""
