"""What is compiled for, and how."""

from pathlib import Path

from .. import ConfigError
from ..cache.fields import Section, setting
from .targets import Target
from .targets.attached import attached


class CompileConfig(Section):
    """The target and the form of the compiled code."""

    devices: str = setting("cpu", compiles=False)
    """Device to run on, which code is made for: cpu, or gpu for the first GPU of this host."""

    use_subgraphs: bool = setting(True, compiles=True)
    """Compile equal blocks of a model once and call them per layer: a tenth of the compile time of a deep model."""

    autotune_results: Path | None = setting(None, compiles=False)
    """Measurements made on such a GPU, in XLA's text form, by which kernels are chosen; their content joins the key."""

    use_vendor_blas: bool = setting(False, compiles=True)
    """Multiply matrices on NVIDIA's GPUs by cuBLASLt, which the host then needs, and not by compiled kernels."""

    num_threads: int | None = setting(None, compiles=False, ge=1, le=1024)
    """Threads that compute; all models of a process share them [default: one for each CPU that the process may use]."""

    def target(self) -> Target:
        """The target of `devices`; raises ConfigError for a device that this host does not have."""
        if self.devices in ("gpu", "gpu:0"):
            return _gpu()
        target = Target.parse(self.devices)
        if not target.runs_here() and target.arch not in attached(target.platform):
            raise ConfigError(
                f"this host has no {target.name} to run on",
                f"Leave --devices out, or compile for such a device: max warm-cache --target {target.name}.",
            )
        return target


def _gpu() -> Target:
    """The first GPU of this host; raises ConfigError where there is none, or one that there are no figures for."""
    for platform in ("cuda", "hip"):
        for arch in attached(platform)[:1]:
            return Target.parse(f"{platform}:{arch}")
    raise ConfigError(
        "this host has no GPU to run on",
        "Leave --devices out, or compile for one that is elsewhere: max warm-cache --target cuda:sm_90.",
    )
