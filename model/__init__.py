"""The net of the paper: layers, presets, initialisation and cost."""
