"""Checks and measures a device in one command: `python -m max.bench.device`."""
