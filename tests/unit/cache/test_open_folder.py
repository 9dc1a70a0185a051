"""Folders that cannot be used as wished: one warning, and the caller goes on."""

import logging
import subprocess
import sys
import textwrap

import pytest

from max.cache.key import make_key

KEY = make_key({"a": 1})


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("policy", ["on", "readonly", "redo"])
@pytest.mark.parametrize("trouble", ["world-writable", "file", "layout"])
def test_an_unusable_folder_means_no_cache(open_store, make_artifact, caplog, policy, trouble):
    root = open_store().root
    if trouble == "world-writable":
        root.chmod(0o777)
    elif trouble == "layout":
        (root / "VERSION").write_text("99")
    else:
        root = root / "VERSION"
    store = open_store(policy, root=root)
    assert store.lookup(KEY) is None and store.publish(KEY, make_artifact()) is None
    assert store.counters.misses == {"no cache": 1}
    assert len(warnings(caplog)) == 1


def test_a_parent_that_cannot_be_made_means_no_cache(open_store, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert open_store(root=tmp_path / "file" / "below" / "cache").lookup(KEY) is None
    assert len(warnings(caplog)) == 1


AS_A_USER = """
    import logging, os, sys
    from pathlib import Path
    from max.cache import key, config, store

    logging.basicConfig(level="WARNING", stream=sys.stdout, format="%(message)s")
    if os.geteuid() == 0:
        os.setuid(65534)
    opened = store.Store.open(config.CacheConfig(cache_dir=Path(sys.argv[1])))
    wanted = key.make_key({"a": 1})
    print("found", opened.lookup(wanted) is not None, "kept", opened.publish(wanted, b"") is not None)
    with opened.lease(wanted) as lease:
        print("held", lease.held)
"""


def test_a_folder_that_cannot_be_written_is_read(open_store, make_artifact, tmp_path):
    store = open_store()
    store.publish(KEY, make_artifact())
    paths = [tmp_path, store.root, *store.root.rglob("*")]
    for path in [*paths, *tmp_path.parents]:
        if path.stat().st_uid == tmp_path.stat().st_uid and str(path).startswith("/tmp/"):
            path.chmod(0o555 if path in paths else 0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(AS_A_USER), str(store.root)],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for path in paths:
            path.chmod(0o700)
    warned, *lines = done.stdout.splitlines()
    assert "is read-only" in warned
    assert lines == ["found True kept False", "held False"]


def test_a_damaged_entry_is_warned_about_in_a_folder_that_cannot_be_cleaned(open_store, make_artifact, caplog):
    writer = open_store()
    writer.publish(KEY, make_artifact())
    index = writer.root / "index" / f"{KEY}.json"
    index.write_text("damaged")
    store = open_store("readonly")
    assert store.lookup(KEY) is None and store.lookup(KEY) is None
    assert store.counters.quarantined == 1 and len(warnings(caplog)) == 1
    assert index.read_text() == "damaged"
