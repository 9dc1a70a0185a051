"""Puts this folder on the path, so that the tests here and make_references.py import the same `seeded`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
