"""The store: what is published is found, what is damaged is set aside, and no trouble stops the caller."""

import contextlib
import errno
import logging
import os
import time

import msgspec
import pytest

from max import CacheError, ConfigError
from max.cache import mef
from max.cache.binding import Binding, checkpoint_identity
from max.cache.catalog import nearest, records
from max.cache.key import Difference, make_key
from max.cache.mef import MefWriter
from max.cache.record import encode

KEY = make_key({"model": {"layers": 2}, "max_batch": 8})
OTHER = make_key({"model": {"layers": 2}, "max_batch": 4})
PREPARED = "c" * 64


def make_binding(**changes) -> Binding:
    fields = {
        "digest": "d" * 32,
        "key": KEY.digest,
        "factors": KEY.factors,
        "checkpoint": checkpoint_identity({"path": "/m", "files": [], "sha256": "a" * 64}),
        "mef": "b" * 64,
        "prepared": PREPARED,
        "files": (),
        "stop_token_ids": (2,),
        "generation": {},
        "max_length": 512,
        "architecture": "LlamaForCausalLM",
        "created": time.time(),
        "versions": {},
    }
    return Binding(**(fields | changes))


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_published_artifacts_are_found(open_store, make_artifact):
    store = open_store()
    assert store.lookup(KEY) is None
    made = store.publish(KEY, make_artifact(), command="max warm-cache", seconds=1.5)
    assert made is not None
    found = open_store().lookup(KEY)
    assert found is not None and found.id == made.id
    assert found.read(found.sections()[0]) == b"module"
    assert store.lookup(OTHER) is None
    assert store.counters.misses == {"absent": 2}
    assert files(store.root) == sorted(["VERSION", f"blobs/{made.id[:2]}/{made.id}", f"index/{KEY}.json"])
    ((_, record),) = records(store)
    assert (record.command, record.seconds, record.factors, record.bytes) == (
        "max warm-cache",
        1.5,
        KEY.factors,
        made.size,
    )


def test_publish_takes_a_function_that_writes(open_store):
    def write(path):
        with MefWriter(path) as writer:
            writer.add(mef.MODULE, "text", b"written")
            writer.finish()

    store = open_store()
    assert store.publish(KEY, write) is not None
    found = store.lookup(KEY)
    assert found is not None and found.read(found.sections()[0]) == b"written"
    assert (store.counters.hits["exact"], store.counters.bytes_read) == (1, found.size)
    assert store.counters.bytes_written == found.size and store.counters.seconds > 0


def test_two_keys_share_one_blob(open_store, make_artifact):
    store = open_store()
    for key in (KEY, OTHER):
        assert store.publish(key, make_artifact()) is not None
    assert sum(name.startswith("blobs/") for name in files(store.root)) == 1
    assert store.lookup(KEY) and store.lookup(OTHER)


@pytest.mark.parametrize("what", ["flip", "cut", "empty", "swap"])
def test_a_damaged_blob_is_set_aside_and_made_again(open_store, make_artifact, caplog, what):
    store = open_store()
    made = store.publish(KEY, make_artifact())
    (blob,) = (store.root / "blobs").glob("*/*")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes({"flip": bytes(data), "cut": data[:-1], "empty": b"", "swap": make_artifact("other")}[what])

    assert store.lookup(KEY) is None
    assert store.lookup(KEY) is None
    assert store.counters.misses == {"damaged": 1, "absent": 1}
    assert store.counters.quarantined == 1
    assert len(warnings(caplog)) == 1 and "damaged cache entry" in warnings(caplog)[0]
    assert len(os.listdir(store.root / "quarantine")) == 2
    again = store.publish(KEY, make_artifact())
    assert again is not None and made is not None and again.id == made.id
    assert store.lookup(KEY) is not None


@pytest.mark.parametrize("what", ["noise", "other key", "other factors", "empty"])
def test_a_damaged_index_entry_is_set_aside(open_store, make_artifact, caplog, what):
    store = open_store()
    store.publish(KEY, make_artifact())
    store.publish(OTHER, make_artifact())
    index = store.root / "index" / f"{KEY}.json"
    (record,) = (record for _, record in records(store) if record.key == KEY.digest)
    index.write_bytes(
        {
            "noise": b"{" * 500,
            "empty": b"",
            "other key": (store.root / "index" / f"{OTHER}.json").read_bytes(),
            "other factors": encode(msgspec.structs.replace(record, factors=OTHER.factors)),
        }[what]
    )
    assert store.lookup(KEY) is None
    assert store.counters.misses == {"damaged": 1}
    assert store.lookup(OTHER) is not None
    assert len(warnings(caplog)) == 1


def test_no_flipped_byte_is_believed(open_store, make_artifact):
    store = open_store()
    store.publish(KEY, make_artifact())
    blob, index = next((store.root / "blobs").glob("*/*")), store.root / "index" / f"{KEY}.json"
    for path in (blob, index):
        good = path.read_bytes()
        both = {blob: blob.read_bytes(), index: index.read_bytes()}
        for place in [*range(80), *range(4096, 4105), *range(len(good) - 200, len(good), 3)]:
            if place >= len(good):
                continue
            damaged = bytearray(good)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            found = store.lookup(KEY)
            with contextlib.suppress(CacheError):
                assert found is None or found.read(found.sections()[0]) == b"module"
            for either, content in both.items():
                either.write_bytes(content)
    assert store.counters.quarantined > 150 and store.lookup(KEY) is not None


def test_a_missing_blob_is_a_miss(open_store, make_artifact):
    store = open_store()
    store.publish(KEY, make_artifact())
    next((store.root / "blobs").glob("*/*")).unlink()
    assert store.lookup(KEY) is None
    assert store.counters.misses == {"incomplete": 1}
    assert store.publish(KEY, make_artifact()) and store.lookup(KEY)


def test_a_damaged_section_can_be_reported(open_store, make_artifact):
    store = open_store()
    store.publish(KEY, make_artifact())
    blob = next((store.root / "blobs").glob("*/*"))
    data = bytearray(blob.read_bytes())
    data[4096] ^= 1
    blob.write_bytes(data)
    found = store.lookup(KEY)
    assert found is not None
    with pytest.raises(CacheError) as caught:
        found.read(found.sections()[0])
    store.quarantine(KEY, caught.value)
    assert store.lookup(KEY) is None
    assert store.counters.quarantined == 1
    assert files(store.root / "blobs") == []


def test_off_touches_nothing(open_store, make_artifact):
    store = open_store("off")
    assert store.lookup(KEY) is None
    assert store.publish(KEY, make_artifact()) is None
    assert store.lookup_binding("d" * 32) is None and not store.publish_binding(make_binding())
    assert store.prepared_path(PREPARED) is None and not list(records(store))
    with store.lease(KEY) as lease:
        assert (lease.found, lease.held) == (None, False)
    assert store.counters.misses == {"off": 1}
    assert not store.root.exists()


def test_readonly_reads_and_writes_nothing(open_store, make_artifact):
    assert open_store("readonly").lookup(KEY) is None
    writer = open_store()
    assert not writer.root.joinpath("index", f"{KEY}.json").exists()
    writer.publish(KEY, make_artifact())
    index = writer.root / "index" / f"{KEY}.json"
    os.utime(index, (1, 1))
    before = files(writer.root)

    store = open_store("readonly")
    assert store.lookup(KEY) is not None
    assert store.publish(OTHER, make_artifact("other")) is None
    assert not store.publish_binding(make_binding())
    index.write_text("damaged")
    assert store.lookup(KEY) is None
    assert files(writer.root) == before
    with pytest.raises(CacheError), store.temporary():
        pass


def test_readonly_makes_no_folder(open_store):
    assert not open_store("readonly").root.exists()
    assert not open_store("require").root.exists()


def test_redo_passes_over_what_was_there_and_uses_its_own(open_store, make_artifact):
    first = open_store()
    first.publish(KEY, make_artifact("old"))
    first.publish_binding(make_binding())
    store = open_store("redo")
    assert store.lookup(KEY) is None and store.lookup_binding("d" * 32) is None
    assert store.counters.misses == {"redo": 1}
    new = store.publish(KEY, make_artifact("new"))
    store.publish_binding(make_binding())
    found = store.lookup(KEY)
    assert found and new and found.id == new.id
    assert store.lookup_binding("d" * 32) is not None
    later = open_store().lookup(KEY)
    assert later and later.id == new.id


def test_require_names_what_differs_from_the_nearest(open_store, make_artifact):
    writer = open_store()
    writer.publish(OTHER, make_artifact())
    writer.publish(make_key({"model": {"layers": 3}, "max_batch": 16, "target": "cuda"}), make_artifact())
    store = open_store("require")
    with pytest.raises(ConfigError, match="absent") as caught:
        store.lookup(KEY)
    assert "differs in max_batch: 8 wanted, 4 stored;" in caught.value.hint
    assert store.lookup(OTHER) is not None
    writer.quarantine(OTHER, CacheError("damaged"))
    with pytest.raises(ConfigError) as caught:
        store.lookup(KEY)
    assert "(and 2 more: model.layers, target)" in caught.value.hint


@pytest.mark.parametrize("exists", [True, False])
def test_require_without_anything_says_how_to_fill_it(open_store, exists):
    if exists:
        open_store()
    with pytest.raises(ConfigError) as caught:
        open_store("require").lookup(KEY)
    assert "warm-cache" in caught.value.hint


def test_nearest_explains_a_miss(open_store, make_artifact):
    store = open_store()
    assert nearest(store, KEY) is None
    store.publish(OTHER, make_artifact())
    near = nearest(store, KEY)
    assert near is not None and near[0].key == OTHER.digest
    assert near[1] == [Difference("max_batch", 8, 4)]


def test_a_full_disk_is_one_warning(open_store, make_artifact, caplog):
    store = open_store()

    def write(path):
        path.symlink_to("/dev/full")
        path.write_bytes(make_artifact())

    assert store.publish(KEY, write) is None
    assert store.publish(KEY, write) is None
    assert len(warnings(caplog)) == 1
    assert "No space left" in warnings(caplog)[0] and "--max-cache-size" in warnings(caplog)[0]
    assert files(store.root) == ["VERSION"]
    assert store.publish(KEY, make_artifact()) is not None


def test_a_disk_that_fills_between_blob_and_index_leaves_no_entry(open_store, make_artifact, monkeypatch):
    store = open_store()
    monkeypatch.setattr("max.cache.store.write_small", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert store.publish(KEY, make_artifact()) is None
    monkeypatch.undo()
    assert store.lookup(KEY) is None
    assert store.publish(KEY, make_artifact()) is not None


def test_an_invalid_artifact_is_not_published(open_store, caplog):
    store = open_store()
    assert store.publish(KEY, b"not a MEF") is None
    assert files(store.root) == ["VERSION"]
    assert len(warnings(caplog)) == 1


def test_an_error_of_the_writer_passes_and_leaves_nothing(open_store):
    store = open_store()

    def write(path):
        path.write_bytes(b"half")
        raise RuntimeError("the compiler failed")

    with pytest.raises(RuntimeError, match="the compiler failed"):
        store.publish(KEY, write)
    assert files(store.root) == ["VERSION"]


def test_bindings_are_kept_and_damaged_ones_set_aside(open_store, caplog):
    store = open_store()
    binding = make_binding()
    assert store.lookup_binding(binding.digest) is None
    assert store.publish_binding(binding)
    assert store.lookup_binding(binding.digest) == binding
    path = store.root / "bindings" / f"{binding.digest}.json"
    (store.root / "bindings" / ("e" * 32 + ".json")).write_bytes(path.read_bytes())
    assert store.lookup_binding("e" * 32) is None
    path.write_bytes(path.read_bytes()[:-5])
    assert store.lookup_binding(binding.digest) is None
    assert store.counters.quarantined == 2 and len(warnings(caplog)) == 2
    assert os.listdir(store.root / "bindings") == []


def test_prepared_weights_are_moved_in(open_store):
    store = open_store()
    assert store.prepared_path(PREPARED) is None
    with store.temporary(".weights") as path:
        path.write_bytes(b"weights")
        kept = store.publish_prepared(path, PREPARED)
    assert kept == store.root / "prepared" / "cc" / PREPARED
    assert open_store("readonly").prepared_path(PREPARED) == kept
    assert kept.read_bytes() == b"weights"
    store.quarantine_prepared(PREPARED, CacheError("chunk 3 is damaged"))
    assert store.prepared_path(PREPARED) is None


def test_prepared_weights_that_cannot_be_kept_stay_where_they_are(open_store, monkeypatch):
    store = open_store()
    with store.temporary() as path:
        path.write_bytes(b"weights")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
        assert store.publish_prepared(path, PREPARED) is None
        assert path.read_bytes() == b"weights"
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "D" * 32, "d" * 33, "d" * 32 + "\n"])
def test_names_cannot_leave_the_folder(open_store, name):
    with pytest.raises(CacheError, match="is not the name of anything"):
        open_store().lookup_binding(name)
    with pytest.raises(CacheError, match="is not the name of anything"):
        open_store().prepared_path(name)
