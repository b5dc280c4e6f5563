"""The net of the paper: layers, presets, initialisation, cost."""
