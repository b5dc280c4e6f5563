"""The commands around the trainer; `tools/command.py` is the entry point `alexnet-train`."""
