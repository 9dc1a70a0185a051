"""Probes: seeded calls of executables whose results are kept in the artifact, to tell a sound load from a broken one.

Floats come from a counter-based generator (splitmix64 of name and index), integers are zero, which is a valid index
everywhere. A result is kept as its first values, its mean, its norm and how many values are finite, compared within a
tolerance: another CPU of the same target may round differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import xla
from .graph import TensorType

TOLERANCE = 1e-4
_KEPT_VALUES = 8
_MAX_BYTES = 64 << 20


def fits(tensors: Sequence[TensorType]) -> bool:
    """Whether an executable with these arguments and results is small enough to be probed at every build."""
    return sum(type.nbytes for type in tensors) <= _MAX_BYTES


def run(executable: xla.Executable, name: str, arguments: Sequence[TensorType]) -> list[dict[str, Any]]:
    """Calls an executable with its seeded arguments and summarizes every result."""
    inputs = [xla.put(_seeded(f"{name}/{i}", type)) for i, type in enumerate(arguments)]
    return [_summary(xla.fetch(result)) for result in executable(inputs)]


def differences(expected: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between two lists of summaries by more than the tolerance; empty when they agree."""
    if len(expected) != len(found):
        return [f"{len(found)} results instead of {len(expected)}"]
    wrong = []
    for i, (want, have) in enumerate(zip(expected, found, strict=True)):
        pairs = [*zip(want["first"], have["first"], strict=True), (want["mean"], have["mean"])]
        scale = max(1e-6, want["norm"])
        close = all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in pairs)
        close = close and want["finite"] == have["finite"]
        if not close or abs(want["norm"] - have["norm"]) > TOLERANCE * scale:
            wrong.append(f"result {i}: {have} instead of {want}")
    return wrong


def _seeded(name: str, type: TensorType) -> np.ndarray:
    if not type.dtype.startswith(("float", "bfloat")):
        return np.zeros(type.shape, type.dtype)
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        word = np.arange(math.prod(type.shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    unit = ((word ^ (word >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return (unit - np.float32(0.5)).reshape(type.shape).astype(type.dtype)


def _summary(result: np.ndarray) -> dict[str, Any]:
    flat = result.reshape(-1).astype(np.float64)
    finite = np.where(np.isfinite(flat), flat, 0.0)
    return {
        "finite": int(np.isfinite(flat).sum()),
        "first": [float(value) for value in finite[:_KEPT_VALUES]],
        "mean": float(finite.mean()) if finite.size else 0.0,
        "norm": float(np.linalg.norm(finite)),
    }
