"""Reading weights that were trained elsewhere; the parts of tools/import_weights.py."""
