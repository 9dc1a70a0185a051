"""What is compiled for, and how."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import field_validator

from .. import ConfigError
from ..cache.fields import Section, setting
from .targets import Target
from .targets.attached import attached


class CompileConfig(Section):
    """The target and the form of the compiled code."""

    devices: str = setting("cpu", compiles=False)
    """Device to run on, which code is made for: cpu, gpu for the first GPU of this host, gpu:1 for its second; or
    several that compute together, each with its part of the model: gpu:0,1."""

    use_subgraphs: bool = setting(True, compiles=True)
    """Compile equal blocks of a model once and call them per layer: a tenth of the compile time of a deep model."""

    autotune_results: Path | None = setting(None, compiles=False)
    """Measurements made on such a GPU, in XLA's text form, by which kernels are chosen; their content joins the key."""

    use_vendor_blas: bool = setting(False, compiles=True)
    """Multiply matrices on NVIDIA's GPUs by cuBLASLt, which the host then needs, and not by compiled kernels."""

    num_threads: int | None = setting(None, compiles=False, ge=1, le=1024)
    """Threads that compute; all models of a process share them [default: one for each CPU that the process may use]."""

    @field_validator("devices")
    @classmethod
    def _has_distinct_ids(cls, value: str) -> str:
        ids = _ids(value)
        if value.startswith("gpu:") and (not ids or len(set(ids)) < len(ids)):
            raise ValueError("names no GPUs: give the number of each once, as in gpu:0,1")
        return value

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The numbers of the GPUs to run on; empty where none were given."""
        return _ids(self.devices)

    def target(self) -> Target:
        """The target of `devices`; raises ConfigError for a device that this host does not have."""
        if self.devices == "gpu" or self.device_ids:
            return _gpus(self.devices, self.device_ids or (0,))
        target = Target.parse(self.devices)
        if not target.runs_here() and attached(target.platform).count(target.arch) < target.devices:
            raise ConfigError(
                f"this host has no {target.name} to run on",
                f"Leave --devices out, or compile for such a device: max warm-cache --target {target.name}.",
            )
        return target


def _ids(devices: str) -> tuple[int, ...]:
    """The numbers in "gpu:0,1"; none in anything else."""
    kind, _, numbers = devices.partition(":")
    parts = numbers.split(",") if kind == "gpu" else []
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else ()


def _gpus(devices: str, ids: Sequence[int]) -> Target:
    """These GPUs of this host; raises ConfigError where they are not here, differ, or there are no figures for them."""
    for platform in ("cuda", "hip"):
        if not (here := attached(platform)):
            continue
        if max(ids) >= len(here):
            count = "1 GPU" if len(here) == 1 else f"{len(here)} GPUs"
            raise ConfigError(
                f"--devices {devices} names GPU {max(ids)}, and this host has {count}, counted from 0",
                f"Name {len(ids)} that are here, or compile for a host that has them: "
                f"max warm-cache --target {platform}:{next(iter(here))} --devices {devices}.",
            )
        kinds = {here[number] for number in ids}
        if len(kinds) > 1:
            raise ConfigError(
                f"--devices {devices} names GPUs that differ: {', '.join(sorted(kinds))}",
                "Name equal ones: each computes the same part of every layer.",
            )
        return Target.parse(f"{platform}:{kinds.pop()}").over(len(ids))
    raise ConfigError(
        "this host has no GPU to run on",
        "Leave --devices out, or compile for one that is elsewhere: max warm-cache --target cuda:sm_90.",
    )
