"""The ladder of a start: the artifact itself, one that runs here as well, its stored IR compiled anew, a new trace.

What a step may pass over is told by the factors in which two keys differ; everything else must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cache.key import explain

_TARGET = "target."
# Which compiler made the code, and for what; the stored IR is the same.
_OF_THE_CODE = (_TARGET, "toolchain.", "xla_flags")


def runs_here(wanted: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    """Tells of the factors of an artifact whether it serves in place of one of the factors `wanted`.

    It does when both differ in their targets alone, and its target needs nothing that the wanted one does not have.
    """

    def serves(factors: dict[str, Any]) -> bool:
        return _within(wanted, factors, (_TARGET,)) and _is_subset(factors["target"], wanted["target"])

    return serves


def has_same_ir(wanted: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    """Tells of the factors of an artifact whether its stored IR is what a trace under `wanted` would give."""

    def serves(factors: dict[str, Any]) -> bool:
        return _within(wanted, factors, _OF_THE_CODE) and _same_platform(factors["target"], wanted["target"])

    return serves


def _within(wanted: dict[str, Any], factors: dict[str, Any], allowed: tuple[str, ...]) -> bool:
    same_sections = isinstance(factors.get("target"), dict) and isinstance(wanted.get("target"), dict)
    return same_sections and all(each.path.startswith(allowed) for each in explain(wanted, factors))


def _same_platform(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("platform", "machine", "topology"))


def _is_subset(needed: dict[str, Any], offered: dict[str, Any]) -> bool:
    """Whether a CPU's code runs on another: instruction sets are all that tells CPUs of one machine type apart."""
    needs, offers = needed.get("features"), offered.get("features")
    if needed.get("platform") != "cpu" or not isinstance(needs, list) or not isinstance(offers, list):
        return False
    return _same_platform(needed, offered) and set(needs) <= set(offers)
