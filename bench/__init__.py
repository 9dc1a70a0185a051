"""Measurement: load generation, data sets, random checkpoints and reports."""
