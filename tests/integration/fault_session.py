"""A session with the store under faults, run by test_faults.py in a process with faults.c preloaded.

What was in the store before stays and is right, whatever call fails; what is new is there in full or not at all.
"""

import ctypes
import errno
import io
import json
import logging
import shutil
import sys
import time
from pathlib import Path

from max import CacheError
from max.cache import mef
from max.cache.binding import Binding, checkpoint_identity
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.mef import MefWriter
from max.cache.store import Store
from max.runtime.arena import place
from max.runtime.prepared_format import check_file, write_contents

FAULTS = ctypes.CDLL(None)
OLD, NEW = make_key({"model": "old"}), make_key({"model": "new"})
READS, WRITES = 1 | 4 | 32, 2 | 8 | 16 | 32 | 64


def artifact(text: str) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add(mef.MODULE, "text", text.encode(), codec="none")
        writer.finish()
    return file.getvalue()


def binding(key, prepared: str) -> Binding:
    return Binding(
        digest=key.digest, key=key.digest, factors=key.factors,
        checkpoint=checkpoint_identity({"path": "/m", "files": [], "sha256": "a" * 64}),
        mef="b" * 64, prepared=prepared, files=(), stop_token_ids=(2,), generation={}, max_length=512,
        architecture="Llama", created=time.time(), versions={},
    )  # fmt: skip


def prepare(path: Path) -> str:
    with open(path, "xb", buffering=0) as file:
        file.truncate(4096 * 2)
        import xxhash

        return write_contents(file.fileno(), place([("w", (4,), "float32")]), [xxhash.xxh3_64_intdigest(bytes(4096))])


def fill(store: Store, key, text: str) -> None:
    """Everything that a cold start writes."""
    with store.lease(key) as lease:
        if lease.found is None:
            store.publish(key, artifact(text))
    try:
        with store.temporary(".weights") as path:
            identity = prepare(path)
            if store.publish_prepared(path, identity):
                store.publish_binding(binding(key, identity))
    except (OSError, CacheError) as error:
        store.not_kept("file of prepared weights", error)


def opened(root: Path) -> Store:
    return Store.open(CacheConfig(cache_dir=root))


def is_there(root: Path, key, text: str) -> bool:
    """Whether an artifact is there; it is right then."""
    found = opened(root).lookup(key)
    if found is not None:
        found.check()
        assert found.read(found.sections()[0]) == text.encode()
    return found is not None


def is_bound(root: Path, key) -> bool:
    """Whether a binding is there; its weights are right then."""
    store = opened(root)
    found = store.lookup_binding(key.digest)
    if found is not None:
        path = store.prepared_path(found.prepared)
        assert path is not None
        check_file(path, found.prepared)
    return found is not None


def no_leftovers(root: Path) -> bool:
    return not any(any((root / name).iterdir()) for name in ("quarantine", "leases"))


def full_disk(work: Path, count: int) -> int:
    """The n-th write fails, and the `count - 1` after it, for every n that there is."""
    n = 0
    while True:
        n += 1
        root = work / f"full{n}"
        fill(opened(root), OLD, "old")
        FAULTS.fault_arm(str(root).encode(), n, count, errno.ENOSPC, WRITES)
        fill(opened(root), NEW, "new")
        calls = FAULTS.fault_disarm()
        assert is_there(root, OLD, "old") and is_bound(root, OLD), n
        is_there(root, NEW, "new")
        is_bound(root, NEW)
        assert not any((root / "quarantine").iterdir()), n
        fill(opened(root), NEW, "new")
        assert is_there(root, NEW, "new") and is_bound(root, NEW), n
        shutil.rmtree(root)
        if calls < n:
            return n - 1


def network(work: Path, number: int) -> int:
    """The n-th read, open or rename fails twice, as it does on NFS; nobody notices."""
    n = 0
    while True:
        n += 1
        root = work / f"nfs{n}"
        fill(opened(root), OLD, "old")
        FAULTS.fault_arm(str(root).encode(), n, 2, number, READS)
        assert is_there(root, OLD, "old") and is_bound(root, OLD), n
        fill(opened(root), NEW, "new")
        calls = FAULTS.fault_disarm()
        assert is_there(root, NEW, "new") and is_bound(root, NEW) and no_leftovers(root), n
        shutil.rmtree(root)
        if calls < n:
            return n - 1


if __name__ == "__main__":
    logging.getLogger("max").setLevel(logging.CRITICAL)
    place_of_work = Path(sys.argv[1])
    print(
        json.dumps(
            {
                "full once": full_disk(place_of_work, 1),
                "full from then on": full_disk(place_of_work, 1 << 30),
                "ESTALE": network(place_of_work, errno.ESTALE),
                "EBUSY": network(place_of_work, errno.EBUSY),
            }
        )
    )
