"""A graph compiler and runtime for language models on JAX/XLA.

The folders are floors; a file imports from floors below only (docs/structure.md).

    MaxError(message, hint)
    ├ ConfigError              user      an unknown or refused setting
    │ └ MissingArtifactError             nothing may be compiled, and what is wanted is not there
    ├ ModelError               user      a checkpoint or an architecture that cannot be used
    │ ├ UnsupportedArchitecture
    │ └ WeightError                      every missing, unexpected and misshapen tensor at once
    ├ RequestError             user      a request that cannot be answered as asked
    ├ CapacityError            capacity  no room now: queue, pages or memory
    ├ CompileError             internal  names the graph and the stage
    └ CacheError               internal  a damaged or foreign artifact: warned about, then rebuilt
"""

from typing import Literal

__version__ = "0.1.0"

Kind = Literal["user", "capacity", "internal"]


class MaxError(Exception):
    """What went wrong, and in `hint` what to do about it: the two lines that a user sees."""

    kind: Kind = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(MaxError):
    """A setting that is unknown, refused, or out of its range."""

    kind = "user"


class MissingArtifactError(ConfigError):
    """Artifacts are to come from named folders, and none of them was compiled for what is wanted."""


class ModelError(MaxError):
    """A checkpoint or an architecture that cannot be used."""

    kind = "user"


class UnsupportedArchitecture(ModelError):
    """The checkpoint names an architecture that is not in `max list`."""


class WeightError(ModelError):
    """The checkpoint's tensors are damaged or are not those of its config; lists all of them."""


class RequestError(MaxError):
    """A request that cannot be answered as asked: too long, or with impossible parameters."""

    kind = "user"


class CapacityError(MaxError):
    """There is no room now: the queue, the pages or the memory are full."""

    kind = "capacity"


class CompileError(MaxError):
    """A graph did not pass a stage; the message names both."""


class CacheError(MaxError):
    """An artifact is damaged, truncated or foreign. Never fatal: callers warn, drop it and rebuild."""
