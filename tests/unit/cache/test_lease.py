"""Leases: one maker among many, and none of them waits for the dead."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from max.cache import lease as lease_module
from max.cache.key import make_key
from max.cache.lease import single_flight

NAME = "a" * 32
KEY = make_key({"a": 1})


def lease_files(folder):
    return sorted(os.listdir(folder))


def write_lease(folder, generation=0, age_s=0.0, **owner):
    path = folder / f"{NAME}.{generation}"
    path.write_text(json.dumps(lease_module._self() | owner))
    at = time.time() - age_s
    os.utime(path, (at, at))


def nothing():
    return None


def test_a_free_lease_is_held_and_released(tmp_path):
    with single_flight(tmp_path, NAME, nothing) as lease:
        assert lease.held and lease.found is None
        assert lease_files(tmp_path) == [f"{NAME}.0"]
    assert lease_files(tmp_path) == []


def test_a_lease_is_released_by_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), single_flight(tmp_path, NAME, nothing):
        raise RuntimeError("failed")
    assert lease_files(tmp_path) == []


def test_what_was_made_before_the_lease_is_found(tmp_path):
    with single_flight(tmp_path, NAME, lambda: "made") as lease:
        assert (lease.held, lease.found) == (False, "made")
        assert lease_files(tmp_path) == []


def test_leases_of_other_names_do_not_wait(tmp_path):
    with single_flight(tmp_path, NAME, nothing), single_flight(tmp_path, "b" * 32, nothing) as lease:
        assert lease.held


def test_a_waiter_gets_what_the_holder_made(tmp_path):
    made, told = [], []

    def hold():
        with single_flight(tmp_path, NAME, nothing):
            ready.set()
            time.sleep(0.2)
            made.append("made")

    ready = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    with single_flight(tmp_path, NAME, lambda: made[0] if made else None, on_wait=told.append) as lease:
        assert (lease.held, lease.found) == (False, "made")
        assert lease.waited_s > 0.1
    thread.join()
    assert told[0].holder.startswith(f"pid {os.getpid()} on ")


def test_a_waiter_takes_over_when_the_holder_made_nothing(tmp_path):
    def hold():
        with contextlib.suppress(RuntimeError), single_flight(tmp_path, NAME, nothing):
            ready.set()
            time.sleep(0.1)
            raise RuntimeError

    ready = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    with single_flight(tmp_path, NAME, nothing) as lease:
        assert lease.held
    thread.join()


def test_too_long_a_wait_goes_on_without_the_lease(tmp_path):
    with (
        single_flight(tmp_path, NAME, nothing),
        single_flight(tmp_path, NAME, nothing, limit_s=0.1) as lease,
    ):
        assert (lease.held, lease.found) == (False, None)
        assert lease_files(tmp_path) == [f"{NAME}.0"]


@pytest.mark.parametrize(
    ("owner", "age_s"),
    [
        ({"pid": 2**22 + 1, "started": 1}, 0.0),  # no such process can exist
        ({"started": 1}, 0.0),  # our pid, of an earlier process
        ({"pid": "x"}, 0.0),
        ({"pids": "another namespace"}, 60.0),  # silent, by a clock that is the same
    ],
)
def test_a_dead_holder_is_outbid_at_once(tmp_path, owner, age_s):
    write_lease(tmp_path, generation=3, age_s=age_s, **owner)
    with single_flight(tmp_path, NAME, nothing) as lease:
        assert lease.held and lease.waited_s < 20.0
        assert lease_files(tmp_path) == [f"{NAME}.3", f"{NAME}.4"]
    assert lease_files(tmp_path) == []


@pytest.mark.parametrize("owner", [{"host": "elsewhere", "boot": "another"}, None])
def test_a_silent_holder_is_outbid_after_a_while(tmp_path, owner):
    if owner is None:
        (tmp_path / f"{NAME}.0").write_bytes(b"")
    else:
        # A clock that is an hour ahead of ours says nothing; that the time does not change does.
        write_lease(tmp_path, age_s=-3600.0, **owner)
    with single_flight(tmp_path, NAME, nothing, stale_s=0.3) as lease:
        assert lease.held and lease.waited_s >= 0.3


def test_a_heartbeat_keeps_a_slow_holder(tmp_path):
    write_lease(tmp_path, host="elsewhere", boot="another")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / f"{NAME}.0")

    thread = threading.Thread(target=beat)
    thread.start()
    with single_flight(tmp_path, NAME, nothing, stale_s=0.4, limit_s=0.8) as lease:
        assert not lease.held
    stop.set()
    thread.join()


def test_the_holder_beats(tmp_path):
    with single_flight(tmp_path, NAME, nothing, stale_s=0.2):
        path = tmp_path / f"{NAME}.0"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1


def test_an_outbid_holder_removes_nothing(tmp_path):
    with single_flight(tmp_path, NAME, nothing):
        write_lease(tmp_path, generation=1)
    assert lease_files(tmp_path) == [f"{NAME}.0", f"{NAME}.1"]


def test_a_holder_does_not_remove_a_later_lease_of_its_number(tmp_path):
    with single_flight(tmp_path, NAME, nothing):
        (tmp_path / f"{NAME}.0").unlink()
        write_lease(tmp_path)
    assert lease_files(tmp_path) == [f"{NAME}.0"]


def test_without_a_folder_the_work_is_done_without_a_lease(tmp_path):
    with single_flight(tmp_path / "missing", NAME, nothing) as lease:
        assert (lease.held, lease.found) == (False, None)


FORKED = """
    import os, sys, time
    from pathlib import Path
    from max.cache.config import CacheConfig
    from max.cache.key import make_key
    from max.cache.store import Store

    root, number, artifact = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    config, key = CacheConfig(cache_dir=root / "cache"), make_key({"a": 1})
    start = root / "start"

    def child(name):
        while not start.exists():
            time.sleep(0.005)
        store = Store.open(config)
        mef = store.lookup(key)
        if mef is None:
            with store.lease(key) as lease:
                mef = lease.found
                if mef is None:
                    (root / f"compiled-{name}").write_text(str(lease.held))
                    time.sleep(0.3)
                    mef = store.publish(key, artifact.read_bytes())
        assert mef.read(mef.sections()[0]) == b"module"

    children = []
    for name in range(number):
        pid = os.fork()
        if pid == 0:
            try:
                child(name)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    start.touch()
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


def test_of_sixteen_processes_one_compiles(tmp_path, make_artifact):
    artifact = tmp_path / "artifact"
    artifact.write_bytes(make_artifact())
    script = textwrap.dedent(FORKED)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "16", str(artifact)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (compiled,) = tmp_path.glob("compiled-*")
    assert compiled.read_text() == "True"
    assert lease_files(tmp_path / "cache" / "leases") == lease_files(tmp_path / "cache" / "tmp") == []


HOLDER = """
    import sys, time
    from pathlib import Path
    from max.cache.lease import single_flight

    with single_flight(Path(sys.argv[1]), sys.argv[2], lambda: None) as lease:
        print(lease.held, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_outbid_by_one_of_the_waiters(tmp_path, reaped):
    script = textwrap.dedent(HOLDER)
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), NAME], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    made, outcomes = [], []

    def wait():
        # Whose beats stay away for a minute is not yet given up: that the process is gone must show at once.
        with single_flight(tmp_path, NAME, lambda: made[0] if made else None, stale_s=600, limit_s=60) as lease:
            outcomes.append(lease.held)
            if lease.held:
                time.sleep(0.2)
                made.append("made")

    waiters = [threading.Thread(target=wait) for _ in range(6)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.2)
    assert outcomes == []
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    for waiter in waiters:
        waiter.join()
    assert sorted(outcomes) == [False] * 5 + [True]
    assert lease_files(tmp_path) == []
    holder.wait()
    holder.stdout.close()


def test_a_store_leases_by_key(open_store, make_artifact):
    store = open_store()
    with store.lease(KEY) as lease:
        assert lease.held
        assert lease_files(store.root / "leases") == [f"{KEY}.0"]
        store.publish(KEY, make_artifact())
    with open_store().lease(KEY) as lease:
        assert not lease.held and lease.found is not None
    assert store.counters.misses == {}
