"""Parsers under random input whose hashes hold: none raises anything but the errors that a user is told.

FUZZ_EXAMPLES=20000 pytest tests/unit/cache/test_fuzz.py fuzzes for minutes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from max import CacheError, ConfigError
from max.cache import mef, signing
from max.cache.binding import Binding
from max.cache.bundle import read_bundle
from max.cache.config import CacheConfig
from max.cache.exported import ExportManifest, read_manifest
from max.cache.key import make_key
from max.cache.mef import Mef
from max.cache.record import ActionRecord, decode, seal
from max.cache.remote import Remote
from max.cache.signing import SignatureRecord
from max.cache.store import Store
from max.cache.verdict import Verdict
from max.runtime.prepared_format import HEADER_BYTES, check_file

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", settings().max_examples * 3 // 2))
"""How many inputs each parser is given."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fuzz = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def changed(draw: st.DrawFn, value: dict) -> dict:
    """A JSON object with some of its fields replaced, removed or added, at any depth."""
    result = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        at = result
        while True:
            name = draw(st.sampled_from(sorted(at)) if at else st.text(max_size=4))
            if isinstance(at.get(name), dict) and draw(st.booleans()):
                at = at[name]
                continue
            break
        action = draw(st.integers(0, 3))
        if action == 0:
            at.pop(name, None)
        elif action == 1:
            at[draw(st.text(max_size=6))] = draw(json_values)
        else:
            at[name] = draw(json_values)
    return result


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


RECORD = {
    "format": 1, "key": "a" * 32, "factors": {"a": 1}, "mef": "b" * 64, "bytes": 10,
    "created": 1.0, "command": "max", "seconds": 2.0,
}  # fmt: skip
SIGNED = {
    "format": 1, "key": "a" * 32, "mef": "b" * 64, "signatures": [{"signer": "QUJD", "value": "QUJD"}],
}  # fmt: skip
VERDICT = {
    "format": 1, "mef": "b" * 64, "machine": "a" * 32, "sound": True, "detail": "", "created": 1.0,
}  # fmt: skip


@fuzz
@given(data=st.data())
def test_records_whose_check_value_holds(binding_bytes: bytes, data: st.DataObject) -> None:
    binding = json.loads(binding_bytes)["record"]
    body = data.draw(
        st.one_of(*(changed(good).map(dumped) for good in (RECORD, binding, SIGNED, VERDICT)), st.binary(max_size=300))
    )
    for record_type in (ActionRecord, Binding, SignatureRecord, Verdict):
        try:
            decode(seal(body), record_type, "it")
        except CacheError as error:
            assert error.message
    try:
        Binding.decoded(seal(body))
    except CacheError as error:
        assert error.message


SECTION = {
    "id": 0, "kind": "module", "name": "a", "target": "", "offset": 4096, "stored_bytes": 100, "raw_bytes": 100,
    "codec": "none", "sha256": hashlib.sha256(bytes(100)).hexdigest(),
}  # fmt: skip


@fuzz
@given(
    st.one_of(st.lists(changed(SECTION), max_size=3).map(dumped), json_values.map(dumped), st.binary(max_size=200)),
    st.binary(min_size=100, max_size=200),
    st.lists(st.tuples(st.integers(8, 79), st.integers(0, 255)), max_size=2),
)
def test_artifacts_whose_hashes_hold(table: bytes, body: bytes, header_bytes: list[tuple[int, int]]) -> None:
    end = 4096 + len(body)
    header = bytearray(
        struct.pack(
            "<8sHHIQQQ32sII", mef.MAGIC, *mef.VERSION, 4096, end + len(table), end, len(table),
            hashlib.sha256(table).digest(), 0, 0,
        )
    )  # fmt: skip
    for at, value in header_bytes:
        header[at] = value
    data = (bytes(header) + hashlib.sha256(header).digest()).ljust(4096, b"\0") + body + table
    try:
        opened = Mef.from_bytes(data)
        opened.check()
        for section in opened.sections():
            assert len(opened.read(section)) == section.raw_bytes
    except CacheError as error:
        assert error.message and error.hint


@fuzz
@given(st.one_of(changed(json.loads('{"format": 1, "artifacts": []}')).map(dumped), st.binary(max_size=300)))
def test_manifests(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "manifests"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    try:
        assert isinstance(read_manifest(folder), ExportManifest)
    except ConfigError as error:
        assert error.message and error.hint


@fuzz
@given(data=st.data())
def test_prepared_weights_whose_hashes_hold(weights: tuple[Path, str, bytes], data: st.DataObject) -> None:
    path, _, good = weights
    offset = struct.unpack_from("<Q", good, 24)[0]
    toc = json.loads(good[offset:])
    table = data.draw(st.one_of(changed(toc).map(dumped), json_values.map(dumped), st.binary(max_size=200)))
    header = bytearray(good[:72])
    struct.pack_into("<QQQ32s", header, 16, offset + len(table), offset, len(table), hashlib.sha256(table).digest())
    target = path.with_name("fuzzed")
    target.write_bytes(bytes(header).ljust(HEADER_BYTES, b"\0") + good[HEADER_BYTES:offset] + table)
    identity = hashlib.sha256(table).hexdigest()
    try:
        check_file(target, identity)
    except CacheError as error:
        assert error.message and error.hint


KEY = make_key({"model": {"layers": 2}})


@pytest.fixture(scope="module")
def row(mef_bytes: bytes) -> dict:
    """What a manifest or a remote says of an artifact that it does hold."""
    opened = Mef.from_bytes(mef_bytes)
    return {
        "file": "text-1.mef", "name": "text", "target": "cpu", "key": KEY.digest, "mef": opened.id,
        "bytes": opened.size, "factors": KEY.factors, "graphs": {}, "signatures": {**SIGNED, "mef": opened.id},
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that takes whatever comes from elsewhere."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "nobody").touch(0o600)
    return Store.open(CacheConfig(cache_dir=folder / "cache", trusted_keys=folder / "nobody"))


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@st.composite
def overwritten(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes of which some are others, or which end early."""
    data = bytearray(good)
    for at in draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@fuzz
@given(data=st.data())
def test_bundles(mef_bytes: bytes, row: dict, store: Store, data: st.DataObject) -> None:
    manifest = data.draw(st.one_of(st.just(row), changed(row)).map(lambda each: dumped({"artifacts": [each]})))
    names = st.sampled_from(["text-1.mef", "manifest.json", "../text-1.mef", "/etc/x", ""])
    body = data.draw(st.one_of(st.just(mef_bytes), overwritten(mef_bytes)))
    archive = tar_of([("manifest.json", manifest), (data.draw(names), body)])
    path = store.root.parent / "a.bundle"
    # The headers and the manifest are at the front: half of the damage goes there.
    head = data.draw(st.one_of(st.just(archive[:4096]), overwritten(archive[:4096])))
    path.write_bytes(
        data.draw(st.one_of(st.just(head + archive[4096:]), overwritten(archive), st.binary(max_size=900)))
    )
    try:
        for kept in read_bundle(path, store, store.trust):
            found = Mef.open(store.blob_path(kept.mef))
            found.check()
    except (ConfigError, CacheError) as error:
        assert error.message and error.hint


@fuzz
@given(data=st.data())
def test_what_a_remote_answers(mef_bytes: bytes, row: dict, store: Store, data: st.DataObject) -> None:
    folder = store.root.parent / "remote"
    (folder / "v1" / "index").mkdir(parents=True, exist_ok=True)
    (folder / "v1" / "blobs").mkdir(exist_ok=True)
    said = {"key": KEY.digest, "artifact": row, "created": 1.0}
    body = data.draw(st.one_of(st.just(said), changed(said)).map(dumped) | st.binary(max_size=300))
    record = data.draw(st.one_of(st.just(seal(body)), overwritten(seal(body))))
    (folder / "v1" / "index" / f"{KEY.digest}.json").write_bytes(record)
    (folder / "v1" / "blobs" / row["mef"]).write_bytes(data.draw(st.one_of(st.just(mef_bytes), overwritten(mef_bytes))))
    try:
        found = Remote(f"file://{folder}", store.trust).fetch(KEY, store)
        assert found is None or found.id == row["mef"]
    except CacheError as error:
        assert error.message and error.hint


@fuzz
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(["ed25519", "#", " ", "rsa", "\0", "A" * 43 + "=", "me"]) | st.text(max_size=50))
        .map(" ".join).map(lambda text: text.encode(errors="surrogatepass")),
    )
)  # fmt: skip
def test_trusted_keys_and_private_keys(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    for read in (signing.read_trusted, signing.read_key):
        try:
            read(path)
        except ConfigError as error:
            assert error.message and error.hint
    pem = path.with_name("pem")
    pem.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + content + b"\n-----END PRIVATE KEY-----\n")
    pem.chmod(0o600)
    with pytest.raises(ConfigError):
        signing.read_key(pem)
