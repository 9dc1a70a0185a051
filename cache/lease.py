"""Single flight: of all processes that miss the same artifact at once, one makes it and the others wait for it.

A lease is a file `<name>.<generation>` made with O_EXCL; its holder refreshes its time every few seconds. A lease whose
holder is dead or silent is not removed but outbid: the next generation's file is made, again with O_EXCL, so that of
several takers one wins. Files of outbid generations stay until the taker is done, so that their numbers cannot be had
twice. Should two processes hold a lease after all, work is done twice and nothing else happens.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HEARTBEAT_S = 5.0
STALE_S = 30.0
WAIT_LIMIT_S = 3600.0
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 0.5


@dataclass(frozen=True)
class Waiting:
    """Whom a waiter waits for, and how long it has."""

    holder: str
    seconds: float


@dataclass(frozen=True)
class Lease[T]:
    """The outcome: `found` is what another process made meanwhile; if it is None, the work is the caller's.

    held: whether others wait for the caller; False after too long a wait, or where no lease can be taken
    """

    found: T | None
    held: bool
    waited_s: float


@contextlib.contextmanager
def single_flight[T](
    folder: Path,
    name: str,
    find: Callable[[], T | None],
    *,
    on_wait: Callable[[Waiting], None] | None = None,
    limit_s: float = WAIT_LIMIT_S,
    stale_s: float = STALE_S,
) -> Iterator[Lease[T]]:
    """Takes the lease `name`, or waits until its holder is done and `find` returns what it made.

    on_wait: called about once a second while waiting
    limit_s: after so long a wait the caller goes on without the lease
    stale_s: a holder silent for so long is taken over
    Raises: what `find` raises; trouble with the lease's own files means going on without it.
    """
    started = time.monotonic()
    try:
        held, found = _acquire(folder, name, find, on_wait, limit_s, stale_s)
    except OSError:
        held, found = None, None
    waited = time.monotonic() - started
    if held is None:
        yield Lease(found, False, waited)
        return
    with held, _heartbeat(held, min(HEARTBEAT_S, stale_s / 4)):
        # The last holder may have finished between the caller's miss and this lease.
        found = find()
        if found is None:
            yield Lease(None, True, waited)
            return
    yield Lease(found, False, waited)


@dataclass(frozen=True)
class _Held:
    """A lease file that this process made; the open descriptor tells it from a later file of the same name."""

    folder: Path
    name: str
    generation: int
    descriptor: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.{self.generation}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        """Removes this generation and those that it outbid, oldest first; nothing when it was itself outbid."""
        try:
            with contextlib.suppress(OSError):
                mine = os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
                if mine and _newest(self.folder, self.name) == self.generation:
                    for number in range(self.generation + 1):
                        (self.folder / f"{self.name}.{number}").unlink(missing_ok=True)
        finally:
            os.close(self.descriptor)


@dataclass
class _Watch:
    """What a waiter has seen of the lease, by its own clock: clocks of two hosts may differ."""

    seen: tuple[int, int] | None = None
    since: float = field(default_factory=time.monotonic)

    def unchanged_s(self, generation: int, mtime_ns: int) -> float:
        if self.seen != (generation, mtime_ns):
            self.seen, self.since = (generation, mtime_ns), time.monotonic()
        return time.monotonic() - self.since


def _acquire[T](
    folder: Path,
    name: str,
    find: Callable[[], T | None],
    on_wait: Callable[[Waiting], None] | None,
    limit_s: float,
    stale_s: float,
) -> tuple[_Held | None, T | None]:
    """Returns the lease, or what its holder made, or neither after `limit_s`. Raises: OSError, and as `find` does."""
    started, told = time.monotonic(), float("-inf")
    watch, poll, has_waited = _Watch(), _FIRST_POLL_S, False
    while True:
        generation = _newest(folder, name)
        if generation is None:
            if has_waited and (found := find()) is not None:
                return None, found
            if (held := _create(folder, name, 0)) is not None:
                return held, None
            continue
        path = folder / f"{name}.{generation}"
        owner = _owner(path)
        if _is_stale(path, generation, owner, watch, stale_s):
            if (held := _create(folder, name, generation + 1)) is not None:
                return held, None
            continue
        now, has_waited = time.monotonic(), True
        if now - started > limit_s:
            return None, None
        if on_wait is not None and now - told >= 1.0:
            told = now
            on_wait(Waiting(_named(owner), now - started))
        time.sleep(poll)
        poll = min(poll * 1.5, _LAST_POLL_S)


def alive_holders(folder: Path) -> tuple[list[str], list[str]]:
    """Returns who holds a lease in a folder, and the names of leases whose holders are dead or silent."""
    live, dead = [], []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        owner = _owner(path)
        stale = _is_stale(path, 0, owner, _Watch(), STALE_S)
        with contextlib.suppress(OSError):
            stale = stale or time.time() - path.stat().st_mtime > STALE_S
        dead.append(name) if stale else live.append(_named(owner))
    return live, dead


def _named(owner: dict[str, Any]) -> str:
    """The holder of a lease in words; it may not have written who it is yet."""
    return f"pid {owner['pid']} on {owner.get('host', '?')}" if "pid" in owner else "another process"


def _newest(folder: Path, name: str) -> int | None:
    numbers = [entry.removeprefix(f"{name}.") for entry in os.listdir(folder) if entry.startswith(f"{name}.")]
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def _create(folder: Path, name: str, generation: int) -> _Held | None:
    """Makes the lease file of a generation; None when another process was faster."""
    path = folder / f"{name}.{generation}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    try:
        os.write(descriptor, json.dumps(_self()).encode())
        # The folder may have been listed before a whole lineage of leases; a later generation has the say then.
        if _newest(folder, name) == generation:
            return _Held(folder, name, generation, descriptor)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    os.close(descriptor)
    path.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _heartbeat(held: _Held, every_s: float) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(held.descriptor)

    thread = threading.Thread(target=beat, name="lease-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _owner(path: Path) -> dict[str, Any]:
    """Returns what the holder wrote of itself; empty while it is writing, and for anything unreadable."""
    try:
        owner = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_stale(path: Path, generation: int, owner: dict[str, Any], watch: _Watch, stale_s: float) -> bool:
    try:
        mtime_ns = path.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    me = _self()
    if owner and all(owner.get(name) == me[name] for name in ("host", "boot", "pids")):
        started = _started(owner.get("pid"))
        if started is None or started != owner.get("started"):
            return True
    same_clock = bool(me["boot"]) and owner.get("boot") == me["boot"]
    if same_clock and time.time() - mtime_ns / 1e9 > stale_s:
        return True
    return watch.unchanged_s(generation, mtime_ns) > stale_s


def _self() -> dict[str, Any]:
    return {**_place(), "pid": os.getpid(), "started": _started(os.getpid())}


@cache
def _place() -> dict[str, str]:
    """Names the host, its boot and the pid namespace: pids are compared within all three only."""
    boot = pids = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        pids = os.readlink("/proc/self/ns/pid")
    return {"host": os.uname().nodename, "boot": boot, "pids": pids}


def _started(pid: Any) -> int | None:
    """Returns when a process started, which tells it from a later one of the same pid; None when it is dead."""
    if type(pid) is not int or pid <= 0:
        return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0
    return 0
