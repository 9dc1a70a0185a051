"""The small dictionary model that ships with the package: its files, and the code that made them."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""Holds config.json, model.safetensors, the tokenizer and the model card, as a downloaded checkpoint would."""
