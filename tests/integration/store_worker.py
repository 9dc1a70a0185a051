"""One of many processes that fill a store at once, run by test_many_processes.py: looks up, else makes, and checks."""

import io
import os
import random
import sys
import time
from pathlib import Path

from max.cache import mef
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.mef import Mef, MefWriter
from max.cache.store import Store


def content(number: int) -> bytes:
    return random.Random(number).randbytes(200_000)


def artifact(number: int) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add(mef.NATIVE, "code", content(number), codec="none")
        writer.finish()
    return file.getvalue()


def check(found: Mef, number: int) -> None:
    found.check()
    assert found.read(found.sections()[0]) == content(number), number


if __name__ == "__main__":
    root, made, keys, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    order = random.Random(os.getpid())
    for turn in range(rounds):
        number = order.randrange(keys)
        # Several keys in every turn, so that there is always something left to be made.
        key = make_key({"number": number, "turn": turn})
        store = Store.open(CacheConfig(cache_dir=root))
        found = store.lookup(key)
        if found is None:
            with store.lease(key, limit_s=60) as lease:
                found = lease.found
                if found is None:
                    time.sleep(0.005)
                    with open(made, "a") as log:
                        log.write(f"{turn} {number}\n")
                    found = store.publish(key, artifact(number))
        assert found is not None
        check(found, number)
