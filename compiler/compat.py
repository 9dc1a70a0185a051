"""The compat stamp of an artifact: what a host must offer to load its code, and whether it does."""

from __future__ import annotations

from typing import Any

from .. import CacheError
from ..cache import mef
from ..cache.key import toolchain
from . import xla_targets
from .targets import Target, spec_files
from .targets import toolchain as toolchain_of


def stamp(target: Target, *, uses_vendor_blas: bool = False) -> dict[str, Any]:
    """The stamp of code compiled here for a target, as plain JSON.

    requires: instruction sets of a CPU; versions: the least of each library; packages: whose executables these are,
    which no other version of them may load; libraries: what the code calls beside them; devices: how many execute it
    together
    """
    versions = toolchain(target.xla_platform)
    found = {
        "target": target.name,
        "platform": target.platform,
        "requires": list(target.features),
        "devices": target.devices,
        "jaxlib": versions.pop("jaxlib"),
    }
    if target.platform == "cpu":
        return {**found, "machine": xla_targets.machine(target)}
    packages = {name: version for name, version in versions.items() if name not in ("mef", "jax", "flax")}
    code = {"code": target.figures["code"]} if "code" in target.figures else {}
    libraries = {"libraries": [toolchain_of.VENDOR_BLAS]} if uses_vendor_blas else {}
    return {**found, **code, **libraries, "versions": spec_files.versions(target.platform), "packages": packages}


def is_lowered(artifact: mef.Mef) -> bool:
    """Whether an artifact holds portable StableHLO and no code yet."""
    return artifact.json(mef.COMPAT).get("form") == "lowered"


def check(stamp: dict[str, Any], host: Target) -> None:
    """Raises CacheError unless this host can load code with this stamp: XLA itself would load and crash.

    StableHLO without code only has to be for the platform.

    host: the device that is to run it
    """
    made_for = stamp["target"]
    missing, devices = host.missing_features(stamp["requires"]), stamp.get("devices", 1)
    if stamp.get("form") == "lowered" and (stamp["platform"], devices) == (host.platform, host.devices):
        return
    if stamp["platform"] != host.platform:
        reason = "another platform"
    elif stamp.get("code") != host.figures.get("code"):
        reason = f"its code is {stamp.get('code')}, and the device takes {host.figures.get('code')}"
    elif devices != host.devices:
        reason = f"it runs on {devices} devices together, and here {'is one' if host.devices == 1 else host.devices}"
    elif missing:
        reason = f"it needs {', '.join(missing)}"
    else:
        _check_versions(stamp, toolchain(host.xla_platform))
        return
    raise CacheError(
        f"the artifact was compiled for {made_for} and cannot run on {host.name}: {reason}",
        f"Compile it with --target {host.name}, or use it on such a device.",
    )


def _check_versions(stamp: dict[str, Any], here: dict[str, str]) -> None:
    wanted = {"jaxlib": stamp["jaxlib"], **stamp.get("packages", {})}
    for name, version in wanted.items():
        if here.get(name) != version:
            raise CacheError(
                f"the artifact was compiled by {name} {version}, and here is {here.get(name, 'none')}",
                f"Install {name}=={version}, or compile it again.",
            )
