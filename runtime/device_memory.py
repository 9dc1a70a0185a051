"""How much of a device's memory a pipeline takes: its pages are what the weights leave of the share it is given.

The number of pages is a constant of the graphs, chosen from the target's data file; a start compares what the artifact
takes with what the device really has (docs/adr/0017-pages-fill-the-device.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import CapacityError, ConfigError
from ..cache import mef
from ..compiler import Target, TensorType
from ..compiler.limits import DEFAULT_UTILIZATION, Limits
from ..compiler.targets import attached

if TYPE_CHECKING:
    from ..compiler.weights import WeightTable
    from .model import TensorSpec
    from .session import CompiledModels

_RESERVED_BYTES = 1 << 30  # of the share: the driver's own, code, what devices exchange
_SAMPLER_ARRAYS = 8  # of a float32 for each row and token of the vocabulary
_NEARLY = 0.97  # what drivers report differs a little from the data file
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_budgets(target: Target, utilization: float | None) -> tuple[int, ...]:
    """Bytes of each device that the process may take, the first one for preference, the next where that is too little.

    First those of the smallest device of the architecture, so that one artifact serves all, then those of the one in
    the data file; a device of this host that has less counts instead. Empty on a CPU without a share, whose pages
    have a default size.

    Raises ConfigError for a share of a CPU's memory that is not this host's.
    """
    if target.platform == "cpu":
        if utilization is None:
            return ()
        if not target.is_native:
            raise ConfigError(
                f"--device-memory-utilization is a share of this host's memory, and {target.name} may be another's",
                "Give --max-batch-total-tokens: how many tokens the pages hold.",
            )
        return (int(_host_memory() * utilization),)
    here = min(attached.memory(target.platform, target.arch), default=None)
    counted = [size if here is None or here >= _NEARLY * size else here for size in target.memory_sizes]
    return tuple(int(size * (utilization or DEFAULT_UTILIZATION)) for size in sorted(set(counted)))


def _host_memory() -> int:
    """Bytes of memory that this process may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def room_for_pages(
    budget: int, target: Target, weights: WeightTable, *, tokens: int, rows: int, vocab_size: int
) -> int:
    """Bytes of each device that are left for pages. tokens: of the largest step; rows: of logits.

    Raises ConfigError where the weights leave nothing.
    """
    parts = [TensorType(weight.dtype, weight.part_shape(target.devices)) for weight in weights.weights]
    taken = sum(part.nbytes for part in parts)
    temporary = tokens * _bytes_per_token(weights, target.devices) + _SAMPLER_ARRAYS * 4 * rows * vocab_size
    room = budget - taken - temporary - _RESERVED_BYTES
    if room <= 0:
        raise ConfigError(
            f"the model does not fit {target.name}: of {_gb(budget)} that may be used, weights take {_gb(taken)} and "
            f"results of a step {_gb(temporary + _RESERVED_BYTES)}",
            "Split it over more devices (--devices gpu:0,1), or raise --device-memory-utilization.",
        )
    return room


def _bytes_per_token(weights: WeightTable, devices: int) -> int:
    """What a step keeps of each token at a time: the widest result of a layer and what is made of it.

    115 KB for Llama 3 8B in bfloat16; XLA takes 95, and took 119 before norms had kernels of their own.
    """
    layers = [weight for weight in weights.weights if weight.name.startswith("blocks.")]
    shapes = [weight.shape if weight.packed else weight.part_shape(devices) for weight in layers]
    itemsize = max((TensorType(weight.element, ()).nbytes for weight in layers), default=4)
    return 2 * itemsize * max((size for shape in shapes for size in shape[-2:]), default=0)


def check_fits(limits: Limits, page_bytes: int, room: int, target: Target) -> None:
    """Raises ConfigError where the pool is larger than the room for it."""
    taken = limits.num_pages * page_bytes
    if taken <= room:
        return
    is_row = limits.num_pages == limits.max_pages + 1
    what = f"one request of {limits.max_length} tokens" if is_row else "--max-batch-total-tokens"
    raise ConfigError(
        f"pages for {what} take {_gb(taken)}, and weights leave {_gb(room)} of {target.name} for them",
        f"{'Give a smaller --max-length' if is_row else 'Ask for fewer tokens'}, raise --device-memory-utilization, "
        "or split the model over more devices.",
    )


def check_loaded(compiled: CompiledModels, limit: int | None) -> None:
    """Raises CapacityError where what an artifact takes is more than a device gives this process.

    limit: bytes; None where the device does not say
    """
    needed = bytes_needed(compiled)
    if limit is not None and needed > limit:
        raise CapacityError(
            f"the artifact for {compiled.target} takes {_gb(needed)} of each device, and this one gives {_gb(limit)}",
            "Compile it for less: a lower --device-memory-utilization, or --max-batch-total-tokens.",
        )


def bytes_needed(compiled: CompiledModels) -> int:
    """What an artifact takes of each device: weights, pages, and the most that a call needs besides."""
    tensors = {spec.name: spec for graph in compiled.graphs.values() for spec in (*graph.weights, *graph.state)}
    memory: Mapping[str, Mapping[str, int]] = compiled.artifact.json(mef.MEMORY)
    temporary = max((found["temporary"] for found in memory.values()), default=0)
    return sum(spec.nbytes for spec in tensors.values()) + temporary


def check_host(pages: Sequence[TensorSpec]) -> None:
    """Raises CapacityError for more than the machine has: taking it would end this process, or another one."""
    wanted, there = sum(spec.nbytes for spec in pages), _host_memory()
    if wanted > there:
        raise CapacityError(
            f"the pages of keys and values take {_gb(wanted)}, and this machine has {_gb(there)}",
            "Lower --max-batch-total-tokens, or --max-length where that is not given.",
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
