"""Eviction: what goes, in which order, and what stays."""

import os
import time

import pytest

from max.cache.binding import Binding, checkpoint_identity
from max.cache.catalog import records
from max.cache.key import make_key

KEYS = [make_key({"number": number}) for number in range(4)]
SIZE = 100_000


def artifact_id(store, key):
    return next(record.mef for _, record in records(store) if record.key == key.digest)


def present(store):
    return [number for number, key in enumerate(KEYS) if (store.root / "index" / f"{key}.json").exists()]


@pytest.fixture
def filled(open_store, make_artifact):
    """A store with four artifacts of some 170 kB (aligned), the first used longest ago."""
    store = open_store()
    for number, key in enumerate(KEYS):
        store.publish(key, make_artifact(str(number), SIZE))
        age(store.root / "index" / f"{key}.json", 1000 - number)
    return store


def age(path, minutes):
    at = time.time() - 60 * minutes
    os.utime(path, (at, at))


def total(store):
    return sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())


def test_nothing_goes_below_the_size(filled):
    filled.evict()
    assert present(filled) == [0, 1, 2, 3]


def test_the_least_recently_used_go_first(filled, open_store):
    each = total(filled) // 4
    store = open_store(size=2 * each + each // 2)
    assert store.lookup(KEYS[0]) is not None  # a use, noted in the index entry's time
    evicted = store.evict()
    assert present(store) == [0, 3]
    assert evicted.paths.__len__() == 4 and evicted.bytes > 2 * SIZE
    assert len(list((store.root / "blobs").glob("*/*"))) == 2
    assert store.lookup(KEYS[3]) is not None


def test_recent_use_is_not_noted_again(filled):
    index = filled.root / "index" / f"{KEYS[0]}.json"
    age(index, 1)
    before = index.stat().st_mtime
    filled.lookup(KEYS[0])
    assert index.stat().st_mtime == before


def test_publishing_evicts_but_never_what_is_published(filled, open_store, make_artifact):
    store = open_store(size=1000)
    new = make_key({"number": "new"})
    assert store.publish(new, make_artifact("new", SIZE)) is not None
    assert present(store) == []
    assert store.lookup(new) is not None


def test_pins_protect_an_artifact_and_its_prepared_weights(filled, open_store):
    store = open_store(size=1)
    for identity, key in (("a" * 64, KEYS[1]), ("b" * 64, KEYS[2])):
        with filled.temporary() as path:
            path.write_bytes(bytes(SIZE))
            filled.publish_prepared(path, identity)
        filled.publish_binding(
            Binding(
                digest=key.digest,
                key=key.digest,
                factors=key.factors,
                checkpoint=checkpoint_identity({"path": "/m", "files": [], "sha256": "a" * 64}),
                mef=artifact_id(filled, key),
                prepared=identity,
                files=(),
                stop_token_ids=(),
                generation={},
                max_length=1,
                architecture="A",
                created=1.0,
                versions={},
            )
        )
    store.pin(KEYS[1])
    store.evict()
    assert present(store) == [1]
    assert [path.name for path in (store.root / "prepared").glob("*/*")] == ["a" * 64]
    store.evict()
    assert os.listdir(store.root / "bindings") == [f"{KEYS[1]}.json"]
    store.pin(KEYS[1], pinned=False)
    store.evict()
    assert present(store) == [] and list((store.root / "prepared").glob("*/*")) == []


def test_prepared_weights_count_and_go_by_their_use(filled, open_store):
    with filled.temporary() as path:
        path.write_bytes(bytes(SIZE))
        kept = filled.publish_prepared(path, "a" * 64)
    assert kept is not None
    age(kept, 5000)
    store = open_store(size=total(filled) - 1000)
    store.evict()
    assert not kept.exists() and present(store) == [0, 1, 2, 3]


def test_a_blob_that_two_keys_name_goes_with_both(open_store, make_artifact):
    store = open_store()
    for key in KEYS[:2]:
        store.publish(key, make_artifact("same", SIZE))
    age(store.root / "index" / f"{KEYS[0]}.json", 100)
    store.pin(KEYS[0])
    tight = open_store(size=1)
    tight.evict()
    assert present(tight) == [0, 1]
    tight.pin(KEYS[0], pinned=False)
    tight.evict()
    assert present(tight) == [] and list((store.root / "blobs").glob("*/*")) == []


def test_a_blob_without_an_entry_stays_while_it_may_be_in_publication(filled, open_store):
    index = filled.root / "index" / f"{KEYS[0]}.json"
    blob = filled.root / "blobs" / artifact_id(filled, KEYS[0])[:2] / artifact_id(filled, KEYS[0])
    index.unlink()
    store = open_store(size=1)
    store.evict()
    assert blob.exists() and present(store) == []
    age(blob, 120)
    store.evict()
    assert not blob.exists()


def test_leftovers_of_crashed_processes_go(open_store):
    store = open_store()
    old, new = store.root / "tmp" / "old", store.root / "tmp" / "new"
    damaged, lease = store.root / "quarantine" / "damaged", store.root / "leases" / "name.0"
    for path in (old, new, damaged, lease):
        path.write_bytes(b"x")
    for path, days in ((old, 2), (damaged, 8), (lease, 2)):
        age(path, days * 1440)
    assert store.evict().paths.__len__() == 3
    assert new.exists() and not old.exists() and not damaged.exists() and not lease.exists()
