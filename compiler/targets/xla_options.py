"""XLA's options for a target: what its defaults would get wrong without a device to measure on.

Measurements can be brought along: on a device host, XLA_FLAGS=--xla_gpu_dump_autotune_results_to=FILE has XLA write
which kernel was the fastest for each product, in protobuf's text form; a later compilation anywhere reads them.
"""

from __future__ import annotations

from pathlib import Path

from ... import ConfigError
from .target import Target

Options = dict[str, str | bool | int]


def xla_options(target: Target, executable: str, autotune: Path | None = None) -> Options:
    """The debug options with which an executable of this name is compiled; autotune: measurements to use.

    Raises ConfigError for measurements where XLA takes none.
    """
    if autotune is not None and target.platform not in ("cuda", "hip"):
        raise ConfigError(f"--autotune-results is for GPUs, and {target.name} is none", "Leave it out for this target.")
    options: Options = {}
    if target.platform == "cuda":
        # Without a device every product would get the smallest tiles there are: 16x8x16, one stage.
        options["xla_gpu_experimental_cost_model_gemm_tiling_default"] = True
    if autotune is not None:
        options["xla_gpu_load_autotune_results_from"] = str(autotune)
    return options
