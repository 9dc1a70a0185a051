"""XLA's options for a target: what its defaults would get wrong without a device to measure on."""

from __future__ import annotations

from .target import Target

Options = dict[str, str | bool | int]


def xla_options(target: Target, executable: str) -> Options:
    """The debug options with which an executable of this name is compiled."""
    if target.platform == "cuda":
        # Without a device every product would get the smallest tiles there are: 16x8x16, one stage.
        return {"xla_gpu_experimental_cost_model_gemm_tiling_default": True}
    return {}
