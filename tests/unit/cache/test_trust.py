"""Folders and files of others: nothing from them is run unless it is signed, and nothing is put there."""

import os

import pytest

from max import ConfigError
from max.cache import signing, trust
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.store import Store

KEY = make_key({"model": {"layers": 2}})
OTHER = make_key({"model": {"layers": 3}})


@pytest.fixture
def signer(tmp_path, monkeypatch):
    """A private key whose public one is trusted by default."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "config" / "max" / "signing-key"
    line = signing.new_key(path)
    (path.parent / "trusted-keys").write_text(line + "\n")
    (path.parent / "trusted-keys").chmod(0o600)
    return signing.read_key(path)


def opened(root, **settings) -> Store:
    return Store.open(CacheConfig(cache_dir=root, **settings))


@pytest.fixture
def shared(tmp_path, make_artifact, signer):
    """A folder with two artifacts, the first of which is signed."""
    root = tmp_path / "cache"
    store = opened(root)
    made = store.publish(KEY, make_artifact("signed"))
    assert made and store.publish(OTHER, make_artifact("not signed"))
    store.add_signatures(signing.sign(signer, KEY.digest, made.id))
    return root


def test_everything_of_a_private_folder_is_used(shared):
    assert opened(shared).lookup(KEY) and opened(shared).lookup(OTHER)


def test_signatures_can_be_required_everywhere(shared, make_artifact, caplog):
    store = opened(shared, require_signed=True)
    assert store.lookup(KEY) and store.lookup(OTHER) is None
    assert store.counters.misses == {"unsigned": 1} and "has no signature of a key in" in caplog.text
    assert store.publish(OTHER, make_artifact("not signed")) and store.lookup(OTHER), "what this process made is used"
    assert opened(shared, require_signed=True).lookup(OTHER) is None


@pytest.fixture(params=["world-writable", "foreign"])
def untrusted(request, shared, monkeypatch):
    """The folder as somebody who must not trust it sees it."""
    if request.param == "world-writable":
        shared.chmod(0o777)
    else:
        monkeypatch.setattr(trust, "is_foreign", lambda state: True)
    return shared


def test_only_signed_artifacts_of_an_untrusted_folder_are_used(untrusted, caplog):
    before = sorted(path for path in untrusted.rglob("*"))
    store = opened(untrusted)
    assert store.readable and not store.writable and not store.is_private
    assert store.lookup(KEY) and store.lookup(OTHER) is None
    assert store.lookup_binding("d" * 32) is None and store.prepared_path("e" * 64) is None
    assert sorted(path for path in untrusted.rglob("*")) == before
    assert "only signed artifacts are used" in caplog.text


def test_without_trusted_keys_an_untrusted_folder_is_not_used(untrusted, tmp_path, caplog):
    (tmp_path / "config" / "max" / "trusted-keys").unlink()
    store = opened(untrusted)
    assert not store.readable and store.lookup(KEY) is None
    assert "going on without a cache" in caplog.text and "--trusted-keys" in caplog.text


def test_a_signed_artifact_does_not_pass_for_another(untrusted, shared):
    """Whoever may write there puts the signed artifact under another key."""
    index = shared / "index"
    signed, other = (next(index.glob(f"{key.digest}*")) for key in (KEY, OTHER))
    record = signed.read_bytes().replace(KEY.digest.encode(), OTHER.digest.encode())
    other.write_bytes(record)
    assert opened(untrusted).lookup(OTHER) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_in_a_folder_of_a_group_needs_a_signature(shared):
    shared.chmod(0o770)
    for path in (*shared.glob("index/*"), *shared.glob("blobs/*/*")):
        os.chown(path, 12345, -1)
    store = opened(shared)
    assert store.writable and store.lookup(KEY) and store.lookup(OTHER) is None


def test_what_is_made_is_signed_and_what_is_taken_over_is_not(tmp_path, make_artifact, signer):
    key_file = tmp_path / "config" / "max" / "signing-key"
    maker = opened(tmp_path / "maker", sign_with=key_file)
    made = maker.publish(KEY, make_artifact("made"))
    assert made and maker.trust.signers(KEY.digest, made.id, maker.signatures(KEY.digest))
    assert opened(tmp_path / "maker", require_signed=True).lookup(KEY)
    taker = opened(tmp_path / "taker", sign_with=key_file)
    with taker.temporary(".mef") as path:
        path.write_bytes(made.content())
        taker.adopt(KEY, made.id, path, None, command="fetched")
    assert taker.signatures(KEY.digest) is None
    assert opened(tmp_path / "taker", require_signed=True).lookup(KEY) is None


def test_a_second_signer_joins_the_first(tmp_path, make_artifact, signer):
    other = tmp_path / "other-key"
    signing.new_key(other)
    store = opened(tmp_path / "cache", sign_with=tmp_path / "config" / "max" / "signing-key")
    made = store.publish(KEY, make_artifact("made"))
    assert made
    record = opened(tmp_path / "cache", sign_with=other).signed(KEY.digest, made.id)
    assert record is not None and len(record.signatures) == 2
    assert opened(tmp_path / "cache").signatures(KEY.digest) == record
    rebuilt = store.publish(KEY, make_artifact("rebuilt"))
    assert rebuilt and len((store.signatures(KEY.digest) or record).signatures) == 1


@pytest.mark.parametrize(("content", "mode"), [(None, 0o600), (b"no key", 0o600), (b"no key", 0o644)])
def test_a_key_that_cannot_sign_is_told_before_anything_is_made(tmp_path, content, mode):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match="key"):
        opened(tmp_path / "cache", sign_with=tmp_path / "key")
    assert not (tmp_path / "cache").exists()
