"""What is compiled for, and how."""

from pathlib import Path

from .. import ConfigError
from ..cache.fields import Section, setting
from .targets import Target


class CompileConfig(Section):
    """The target and the form of the compiled code."""

    devices: str = setting("cpu", compiles=False)
    """Device to run on; its code is made for it. Only cpu today."""

    use_subgraphs: bool = setting(True, compiles=True)
    """Compile equal blocks of a model once and call them per layer: a tenth of the compile time of a deep model."""

    autotune_results: Path | None = setting(None, compiles=False)
    """Measurements made on such a GPU, in XLA's text form, by which kernels are chosen; their content joins the key."""

    def target(self) -> Target:
        """The target of `devices`; raises ConfigError for a device that this host does not have."""
        target = Target.parse(self.devices)
        if not target.runs_here():
            raise ConfigError(
                f"this host has no {target.name} to run on",
                f"Leave --devices out, or compile for such a device: max warm-cache --target {target.name}.",
            )
        return target
