"""What tools/bench.py measures: this project's stages, and the same work done by other packages."""
