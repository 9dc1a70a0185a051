"""XLA's options for a target: what its defaults would get wrong without a device to measure on.

Measurements can be brought along: on a device host, XLA_FLAGS=--xla_gpu_dump_autotune_results_to=FILE has XLA write
which kernel was the fastest for each product, in protobuf's text form; a later compilation anywhere reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ... import ConfigError
from ..weights import Element
from .target import Target

Options = dict[str, str | bool | int]


@dataclass(frozen=True)
class Products:
    """How the products of matrices in a module are computed on GPUs.

    element:         what the matrices are made of
    autotune:        measurements to use
    use_vendor_blas: by the vendor's library, which a host then has to have, and not by kernels that are compiled
    """

    element: Element = "float32"
    autotune: Path | None = None
    use_vendor_blas: bool = False


@dataclass(frozen=True)
class _Tile:
    """The tile of a product that one program computes, and how many parts of the inputs it works through at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 4

    def option(self, itemsize: int, shared_bytes: int) -> str:
        """As XLA takes it, with as many stages as shared memory holds."""
        stage = (self.rows + self.columns) * self.depth * itemsize
        stages = max(1, min(self.stages, (shared_bytes - _RESERVED_BYTES) // stage))
        return (
            f"block_m: {self.rows} block_n: {self.columns} block_k: {self.depth} split_k: 1 num_stages: {stages} "
            f"num_warps: {self.warps} num_ctas: 1 is_tma_allowed: true"
        )


PLAIN = Products()
_ITEMSIZE: dict[Element, int] = {"float32": 4, "bfloat16": 2}
_RESERVED_BYTES = 4096  # of shared memory, for what a kernel keeps beside its tiles

# Without a device XLA gives products on AMD's CDNA small tiles (8x32 in a step of eight tokens), and float32 ones on
# RDNA tiles that leave more values in flight than there are registers: LLVM's allocator then spends 40 s on one block
# of the built-in model, and 2 s with these. Which are the fastest is for a device to tell: --record-autotune-results.
_AMD_TILES = "block_m:{rows},block_n:64,block_k:32,split_k:1,num_stages:1,num_warps:4,num_ctas:1"
_FEW_TOKENS = 32
_DECODE_TOKENS = 64


def xla_options(target: Target, executable: str, products: Products = PLAIN) -> Options:
    """The debug options with which an executable of this name is compiled.

    Raises ConfigError for measurements, or a library of the vendor, where XLA takes none.
    """
    autotune = products.autotune
    if autotune is not None and target.platform not in ("cuda", "hip"):
        raise ConfigError(f"--autotune-results is for GPUs, and {target.name} is none", "Leave it out for this target.")
    options: Options = {}
    if products.use_vendor_blas:
        if target.platform != "cuda":
            raise ConfigError(
                f"--use-vendor-blas is for NVIDIA's GPUs, and {target.name} is none", "Leave it out for this target."
            )
        options["xla_gpu_enable_triton_gemm"] = False
    elif target.platform == "cuda":
        # Without a device every product would get the smallest tiles there are: 16x8x16, one stage.
        options["xla_gpu_experimental_cost_model_gemm_tiling_default"] = True
        if autotune is None and (tokens := _tokens(executable)) is not None:
            shared_bytes = target.figures["shared_memory_per_block_optin"]
            tile = _tile(tokens, products.element, shared_bytes)
            options["xla_gpu_override_gemm_autotuner"] = tile.option(_ITEMSIZE[products.element], shared_bytes)
            # Split before tiles are chosen, whatever those say.
            options["xla_gpu_experimental_force_split_k"] = 1
    if target.platform == "hip" and autotune is None:
        options["xla_gpu_override_gemm_autotuner"] = _AMD_TILES.format(rows=16 if _few_tokens(executable) else 64)
    if autotune is not None:
        options["xla_gpu_load_autotune_results_from"] = str(autotune)
    return options


def _tile(tokens: int, element: Element, shared_bytes: int) -> _Tile:
    """The tile of a step's products.

    Few tokens read all weights and compute little: narrow tiles give every multiprocessor some, and take the inputs
    whole. XLA would split them by itself, and needs another kernel for each product to add up the parts. Many tokens
    take the tiles that a warp group of Hopper multiplies at once, where two stages of them fit.
    """
    if tokens <= _DECODE_TOKENS:
        return _Tile(max(16, tokens), 32, 128 if element == "bfloat16" else 64, warps=4)
    if element == "float32":
        return _Tile(64, 64, 32, warps=4)
    large = _Tile(128, 256, 64, warps=8)
    return large if shared_bytes > 3 * (128 + 256) * 64 * 2 else _Tile(128, 128, 32, warps=8)


def _few_tokens(executable: str) -> bool:
    """Whether its products have few rows: samplers have one for each sequence."""
    tokens = _tokens(executable)
    return tokens is None or tokens <= _FEW_TOKENS


def _tokens(executable: str) -> int | None:
    """The tokens of a step by the name of its executable: 8 of `block_t8`."""
    found = re.search(r"_t(\d+)", executable)
    return int(found[1]) if found else None
