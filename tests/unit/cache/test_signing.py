"""Signatures: openssl agrees with them, and nothing but the signed artifact under its key passes."""

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from max import ConfigError
from max.cache import signing
from max.cache.config import CacheConfig
from max.cache.signing import Signature, SignatureRecord
from max.cache.store import Store

KEY, MEF = "a" * 32, "b" * 64


@pytest.fixture
def key_file(tmp_path):
    signing.new_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def trusted(key_file):
    return {signing.signer_of(signing.read_key(key_file)): "me"}


def test_a_signature_holds_for_its_artifact_and_key_alone(key_file, trusted):
    record = signing.sign(signing.read_key(key_file), KEY, MEF)
    assert signing.valid_signers(record, KEY, MEF, trusted) == list(trusted)
    assert signing.valid_signers(record, KEY, MEF, {}) == []
    assert signing.valid_signers(record, "c" * 32, MEF, trusted) == []
    assert signing.valid_signers(record, KEY, "c" * 64, trusted) == []
    moved = SignatureRecord(key="c" * 32, mef=MEF, signatures=record.signatures)
    assert signing.valid_signers(moved, "c" * 32, MEF, trusted) == []


@pytest.mark.parametrize("value", ["", "x", "AAAA", base64.b64encode(bytes(64)).decode()])
def test_a_broken_signature_is_none(trusted, value):
    record = SignatureRecord(key=KEY, mef=MEF, signatures=(Signature(next(iter(trusted)), value),))
    assert signing.valid_signers(record, KEY, MEF, trusted) == []


def test_signatures_of_one_artifact_are_joined_and_those_of_another_dropped(key_file, tmp_path):
    signing.new_key(tmp_path / "other")
    first = signing.sign(signing.read_key(key_file), KEY, MEF)
    second = signing.sign(signing.read_key(tmp_path / "other"), KEY, MEF)
    assert len(second.joined(first).signatures) == 2 and second.joined(second).signatures == second.signatures
    rebuilt = signing.sign(signing.read_key(key_file), KEY, "c" * 64)
    assert rebuilt.joined(first) == rebuilt


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_openssl_reads_the_key_and_agrees(key_file, tmp_path):
    record = signing.sign(signing.read_key(key_file), KEY, MEF)
    (tmp_path / "statement").write_bytes(signing.statement(KEY, MEF))
    (tmp_path / "signature").write_bytes(base64.b64decode(record.signatures[0].value))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-in", "statement", "-sigfile", "signature", "-inkey", "key"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "statement").write_bytes(signing.statement(KEY, "c" * 64))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_a_private_key_is_its_owners_and_never_replaced(key_file):
    assert key_file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="already"):
        signing.new_key(key_file)
    key_file.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read"):
        signing.read_key(key_file)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", None])
def test_what_is_no_key_is_a_config_error(tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError):
        signing.read_key(path)


def test_trusted_keys_are_lines_with_comments(tmp_path, key_file):
    line = signing.public_line(signing.read_key(key_file), "of the build host")
    path = tmp_path / "trusted"
    path.write_text(f"# ours\n\n{line}\n")
    path.chmod(0o600)
    assert signing.read_trusted(path) == {line.split()[1]: "of the build host"}
    assert signing.read_trusted(tmp_path / "nowhere", may_be_absent=True) == {}


def test_a_file_of_keys_that_was_named_has_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nowhere"))
    settings = {"cache_dir": tmp_path / "cache"}
    assert Store.open(CacheConfig(**settings)).trust.keys == {}
    with pytest.raises(ConfigError, match="trusted keys /missing cannot be read: No such file") as error:
        Store.open(CacheConfig(**settings, trusted_keys=Path("/missing")))
    assert "--trusted-keys" in error.value.hint


@pytest.mark.parametrize("line", ["ed25519", "ed25519 AAAA", "rsa AAAA", "ed25519 " + "A" * 44, "\x00"])
def test_a_line_that_is_no_key_is_named(tmp_path, line):
    path = tmp_path / "trusted"
    path.write_text(f"\n{line}\n")
    path.chmod(0o600)
    if line == "ed25519 " + "A" * 44:
        line += "="
        path.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        signing.read_trusted(path)


def test_trusted_keys_that_others_may_write_are_not_trusted(tmp_path):
    path = tmp_path / "trusted"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        signing.read_trusted(path)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(ConfigError, match="others may write"):
            signing.read_trusted(path)
