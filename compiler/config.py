"""What is compiled for, and how."""

from ..cache.fields import Section, setting
from .targets import Target


class CompileConfig(Section):
    """The target and the form of the compiled code."""

    devices: str = setting("cpu", compiles=False)
    """Device to run on; its code is made for it. Only cpu today."""

    use_subgraphs: bool = setting(True, compiles=True)
    """Compile equal blocks of a model once and call them per layer: a tenth of the compile time of a deep model."""

    def target(self) -> Target:
        """The target of `devices`; raises ConfigError for a device that there is no code for."""
        return Target.parse(self.devices)
