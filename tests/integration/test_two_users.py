"""Two users of one host and one cache folder: what each sees of the other's, and what neither does to it."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from max.cache import mef, signing
from max.cache.catalog import entries
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.mef import Mef, MefWriter
from max.cache.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")

ALICE, BOB, GROUP = 54321, 54322, 54323
SIGNED, PLAIN = make_key({"model": "signed"}), make_key({"model": "plain"})


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Acts as a user in the group that both are in."""
    groups, mask = os.getgroups(), os.umask(0o022)
    os.setgroups([GROUP])
    os.setresgid(GROUP, GROUP, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
        os.umask(mask)


def artifact(text: str) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add(mef.MODULE, "text", text.encode(), codec="none")
        writer.finish()
    return file.getvalue()


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="max-users-"))
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared(place: Path, caplog) -> Path:
    """Alice's cache with a signed artifact and another one; the public key lies beside it, as Bob's trusted keys."""
    root = place / "cache"
    line = signing.new_key(place / "key")
    shutil.chown(place / "key", ALICE)
    with user(ALICE):
        Store.open(CacheConfig(cache_dir=root, sign_with=place / "key")).publish(SIGNED, artifact("signed"))
        assert Store.open(CacheConfig(cache_dir=root)).publish(PLAIN, artifact("plain"))
    (place / "trusted").write_text(line)
    # Whatever is imported late is imported now: users cannot read root's Python.
    strict = CacheConfig(cache_dir=root, trusted_keys=place / "trusted", require_signed=True, cache_policy="readonly")
    assert Store.open(strict).lookup(SIGNED) is not None
    caplog.clear()
    return root


def files(root: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in root.rglob("*")}


def test_a_private_folder_is_no_cache_for_another_user(shared: Path, place: Path, caplog) -> None:
    before = files(shared)
    with user(BOB):
        store = Store.open(CacheConfig(cache_dir=shared, trusted_keys=place / "trusted"))
        assert not store.readable and store.lookup(SIGNED) is None and store.publish(PLAIN, artifact("x")) is None
    assert files(shared) == before
    assert len(caplog.records) == 1 and str(shared) in caplog.text


def test_what_another_user_lets_read_is_used_when_it_is_signed(shared: Path, place: Path, caplog) -> None:
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = files(shared)
    with user(BOB):
        stranger = Store.open(CacheConfig(cache_dir=shared))
        assert not stranger.readable and stranger.lookup(SIGNED) is None
        assert f"belongs to another user (uid {ALICE})" in caplog.text
        store = Store.open(CacheConfig(cache_dir=shared, trusted_keys=place / "trusted"))
        found = store.lookup(SIGNED)
        assert found is not None and found.content() == artifact("signed")
        assert store.lookup(PLAIN) is None and store.counters.misses == {"unsigned": 1}
        assert store.publish(PLAIN, artifact("mine")) is None and len(entries(store)) == 2
    assert files(shared) == before


def test_users_of_a_group_believe_their_own_files_and_signed_ones(shared: Path, place: Path) -> None:
    os.chown(shared, ALICE, GROUP)
    for path in (shared, *shared.rglob("*")):
        os.chown(path, -1, GROUP)
        path.chmod(0o2770 if path.is_dir() else 0o660)
    with user(BOB):
        # Bob cannot trust Alice's folder, but he may write there, as a program of his that is not careful would.
        index = next(path for path in (shared / "index").iterdir() if PLAIN.digest in path.name)
        content = index.read_bytes()
        index.unlink()
        index.write_bytes(content)
    with user(ALICE):
        store = Store.open(CacheConfig(cache_dir=shared, trusted_keys=place / "trusted"))
        assert store.lookup(SIGNED) is not None and store.lookup(PLAIN) is None
        assert store.counters.misses == {"unsigned": 1}
        assert store.publish(PLAIN, artifact("plain")) and store.lookup(PLAIN) is not None
        assert Store.open(CacheConfig(cache_dir=shared)).lookup(PLAIN) is not None, "replaced by her own"


def test_a_folder_of_root_is_read_by_everybody_and_changed_by_nobody(place: Path) -> None:
    root = place / "image"
    made = Store.open(CacheConfig(cache_dir=root)).publish(PLAIN, artifact("plain"))
    assert made is not None
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = files(root)
    with user(BOB):
        store = Store.open(CacheConfig(cache_dir=root))
        found = store.lookup(PLAIN)
        assert isinstance(found, Mef) and found.id == made.id
        assert not store.writable and store.publish(SIGNED, artifact("x")) is None
    assert files(root) == before
