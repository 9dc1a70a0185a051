"""How matrices that are packed for the CPU kernels lie in memory: encodings, panels and their sizes, as numbers."""

from __future__ import annotations

from typing import Literal

from .. import ConfigError

Packing = Literal["", "float32", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"]
"""The encoding of a matrix packed for the CPU kernels; empty where it is not packed."""

PANEL_COLUMNS = 32
_BLOCKS: dict[Packing, tuple[int, int, int]] = {
    "float32": (1, 1, 4),
    "bfloat16": (2, 2, 2),
    "q8_0": (32, 1, 34),
    "q4_0": (32, 1, 18),
    "q4_k": (256, 1, 144),
    "q6_k": (256, 1, 210),
}
"""Inputs of a column that lie together, the elements or blocks they are, and the bytes of each of those."""


def bits_of(packing: Packing) -> float:
    """Bits of an element, its share of scales included."""
    together, parts, nbytes = _BLOCKS[packing]
    return 8 * nbytes * parts / together


def packs(packing: Packing, inputs: int) -> bool:
    """Whether a matrix of so many inputs can have this encoding: the quantized ones take whole blocks of them.

    What q4_k and q6_k cannot take (256 inputs at a time), q8_0 mostly can (32).
    """
    return packing in ("", "float32", "bfloat16") or inputs % _BLOCKS[packing][0] == 0


def packed_shape(packing: Packing, inputs: int, outputs: int, *, gated: bool = False) -> tuple[int, int]:
    """A packed matrix as an array of bytes: (elements or blocks of the encoding, bytes of one).

    The second number tells the encodings apart, even where two take the same memory. Panels have 32 outputs, or 16
    gates and 16 ups. Raises ConfigError for inputs that are no whole blocks.
    """
    together, parts, nbytes = _BLOCKS[packing]
    if not packs(packing, inputs):
        raise ConfigError(
            f"{packing} needs widths that are multiples of {together}, and the model has one of {inputs}",
            f"Use --quantization-encoding {'q8_0, ' if together > 32 else ''}bfloat16 or float32.",
        )
    panels = -(-(outputs // 2) // (PANEL_COLUMNS // 2)) if gated else -(-outputs // PANEL_COLUMNS)
    return panels * PANEL_COLUMNS * -(-inputs // together) * parts, nbytes


def packing_of(shape: tuple[int, ...]) -> Packing:
    """The encoding of a matrix packed in an array of this shape."""
    return next(packing for packing, (_, _, nbytes) in _BLOCKS.items() if shape[-1] == nbytes)


def packed_outputs(shape: tuple[int, ...], inputs: int) -> int:
    """The outputs that a matrix packed in an array of this shape has room for: a multiple of PANEL_COLUMNS."""
    together, parts, _ = _BLOCKS[packing_of(shape)]
    return shape[0] // (-(-inputs // together) * parts)
