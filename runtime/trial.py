"""Trials: an artifact from elsewhere is first loaded, and its probes run, in a process that may crash.

XLA loads code with a bad instruction, a missing handler or a bug without a word; a crash then is a verdict, and not the
end of a server. docs/adr/0015-trials.md says which artifacts are tried, and when.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import NamedTemporaryFile

from .. import CacheError
from ..cache import mef
from ..cache.key import make_key, toolchain
from ..cache.store import Store
from ..cache.verdict import Verdict
from ..compiler import Target, TensorType, compat, native, probe
from .session import CompiledModels

logger = logging.getLogger(__name__)

_TIME_LIMIT_S = 300.0


def machine_digest() -> str:
    """Stands for all that decides how an artifact behaves here: instruction sets, jaxlib, and the kernels' library."""
    library = native.library_path()
    state = library.stat() if library else None
    return make_key(
        {
            "target": Target.parse("cpu").spec(),
            "jaxlib": toolchain().get("jaxlib", ""),
            "kernels": [state.st_size, state.st_mtime_ns] if state else [],
        }
    ).digest


def check_sound(artifact: mef.Mef, path: Path | None, store: Store) -> None:
    """Raises CacheError unless the artifact is known to be sound here; finds it out when nobody has.

    path: where it lies; None for one that is in memory only
    """
    machine = machine_digest()
    verdict = store.verdict(artifact.id, machine)
    if verdict is None:
        logger.info("trial artifact=%s", artifact.id[:12])
        trouble = try_artifact(path) if path else _try_in_memory(artifact)
        verdict = _verdict(artifact.id, machine, trouble)
        store.keep_verdict(verdict)
    if not verdict.sound:
        raise CacheError(f"the artifact {artifact.id[:12]} failed its trial on this machine: {verdict.detail}")


def vouch(artifact: mef.Mef, store: Store) -> None:
    """Notes that this process has compiled the artifact, and so has loaded its code and run its probes already."""
    store.keep_verdict(_verdict(artifact.id, machine_digest(), ""))


def _verdict(artifact_id: str, machine: str, trouble: str) -> Verdict:
    return Verdict(mef=artifact_id, machine=machine, sound=not trouble, detail=trouble, created=time.time())


def _try_in_memory(artifact: mef.Mef) -> str:
    try:
        with NamedTemporaryFile(suffix=".mef") as file:
            file.write(artifact.content())
            file.flush()
            return try_artifact(Path(file.name))
    except OSError as error:
        return f"it cannot be written to a file for its trial: {error.strerror}"


def not_for_here(artifact: mef.Mef) -> str:
    """Why this machine cannot run an artifact that may be sound elsewhere; "" for one that can be tried."""
    if compat.is_lowered(artifact):
        return "it holds no code yet"
    try:
        CompiledModels(artifact).check(Target.parse("cpu"))
    except CacheError as error:
        return error.message
    return ""


def try_artifact(path: Path) -> str:
    """Loads all code of an artifact and runs its probes in a child process; returns what is wrong, or ""."""
    # -P: a folder named `max` in the working directory must not take the package's place.
    command = [sys.executable, "-P", "-m", __name__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not end within {_TIME_LIMIT_S:.0f} s"
    except OSError as error:
        return f"no process can be started for it: {error.strerror}"
    if done.returncode < 0:
        return f"its process died of {signal.Signals(-done.returncode).name}"
    try:
        return str(json.loads(done.stdout.splitlines()[-1])["trouble"])
    except (ValueError, LookupError, TypeError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"its process ended with code {done.returncode}: {last[:200]}"


def run_trial(path: Path) -> str:
    """Does in this process what `try_artifact` does in a child."""
    try:
        artifact = mef.Mef.open(path)
        artifact.check()
        compiled = CompiledModels(artifact)
        compiled.check(Target.parse("cpu"))
        wanted = artifact.json(mef.PROBE)["results"]
        signatures = artifact.json(mef.SIGNATURES)
        for name in dict.fromkeys(call for graph in compiled.graphs.values() for call, _ in graph.calls):
            executable = compiled.load_executable(name)
            if name not in wanted:
                continue
            types = [TensorType(row["dtype"], tuple(row["shape"])) for row in signatures[name]["arguments"]]
            wrong = probe.differences(wanted[name], probe.run(executable, name, types))
            if wrong:
                return f"{name} gives other results than where it was compiled: {wrong[0]}"
    except CacheError as error:
        return error.message
    return ""


if __name__ == "__main__":
    print(json.dumps({"trouble": run_trial(Path(sys.argv[1]))}), flush=True)
