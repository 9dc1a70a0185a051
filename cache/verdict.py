"""Verdicts: whether an artifact was found sound on a kind of machine, so that it is tried once, not at each start."""

from typing import Annotated

import msgspec

from .key import make_key
from .record import Digest, Sha256


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcome of loading an artifact and running its probes, on machines that are alike."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    mef: Sha256
    machine: Digest
    """Stands for the CPU, the version of jaxlib and the kernels: what decides how code behaves."""
    sound: bool
    detail: str
    """What was wrong, or how it is known to be sound."""
    created: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        return verdict_name(self.mef, self.machine)


def verdict_name(mef: str, machine: str) -> str:
    """The name of the record for an artifact and a kind of machine."""
    return make_key({"mef": mef, "machine": machine}).digest
