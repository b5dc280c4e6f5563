"""What tools/bench.py measures: the stages of this project, and the same work done by others."""
