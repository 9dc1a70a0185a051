"""Damage by the thousand: every flipped byte and every truncation is reported, and no parser raises anything else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from max import CacheError, ConfigError
from max.cache import mef
from max.cache.binding import Binding, BoundFile, checkpoint_identity
from max.cache.exported import ExportManifest, read_manifest
from max.cache.key import make_key
from max.cache.mef import Mef, MefWriter
from max.cache.record import ActionRecord, decode, seal
from max.runtime.arena import Arena, place
from max.runtime.prepared import load
from max.runtime.prepared_format import CHUNK_BYTES, HEADER_BYTES, check_file, write_at, write_contents

FLIPS = 10_000
TRUNCATIONS = 1_000
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
"""How many inputs each parser is given; FUZZ_EXAMPLES=100000 fuzzes for minutes."""


def mef_bytes() -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add_json(mef.MANIFEST, "", {"graphs": {f"step_t{n}": [n] * 20 for n in range(30)}})
        writer.add(mef.MODULE, "text", random.Random(0).randbytes(3000))
        writer.add(mef.JAXPR, "a", b"let in " * 300)
        writer.add(mef.NATIVE, "step", random.Random(1).randbytes(9000), target="cpu", codec="none")
        writer.finish()
    return file.getvalue()


def binding_bytes() -> bytes:
    key = make_key({"model": {"layers": 2}, "limits": list(range(30))})
    return Binding(
        digest="d" * 32, key=key.digest, factors=key.factors,
        checkpoint=checkpoint_identity({"path": "/m", "files": [], "sha256": "a" * 64}),
        mef="b" * 64, prepared="c" * 64, files=(BoundFile("/m/tokenizer.json", "e" * 64),), stop_token_ids=(2,),
        generation={"temperature": 0.7}, max_length=512, architecture="Llama", created=1.5, versions={"jax": "1"},
    ).encoded()  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bytes]:
    """A file of prepared weights, its id, and its bytes."""
    path = tmp_path_factory.mktemp("weights") / "w"
    slots = place([("a", (40, 30), np.dtype("float32")), ("b", (5000,), np.dtype("uint8"))])
    data = np.zeros(slots[-1].stop, np.uint8)
    data[:4800] = np.frombuffer(random.Random(2).randbytes(4800), np.uint8)
    with open(path, "xb", buffering=0) as file:
        write_at(file.fileno(), data.data, HEADER_BYTES)
        digests = [
            xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES].data) for at in range(0, len(data), CHUNK_BYTES)
        ]
        identity = write_contents(file.fileno(), slots, digests)
    return path, identity, path.read_bytes()


def assault(good: bytes, read: Callable[[bytes], object]) -> None:
    """Flips single bytes and cuts the end off; each must be a CacheError."""
    read(good)
    chance = random.Random(3)
    for _ in range(FLIPS):
        at, bit = chance.randrange(len(good)), 1 << chance.randrange(8)
        damaged = bytearray(good)
        damaged[at] ^= bit
        assert is_reported(read, bytes(damaged)), (at, bit)
    for length in [chance.randrange(len(good)) for _ in range(TRUNCATIONS)]:
        assert is_reported(read, good[:length]), length


def is_reported(read: Callable[[bytes], object], data: bytes) -> bool:
    try:
        read(data)
    except CacheError:
        return True
    return False


def test_an_artifact() -> None:
    assault(mef_bytes(), lambda data: Mef.from_bytes(data).check())


def test_a_binding() -> None:
    assault(binding_bytes(), Binding.decoded)


def test_prepared_weights(weights: tuple[Path, str, bytes], tmp_path: Path) -> None:
    _, identity, good = weights
    path = tmp_path / "damaged"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_file(path, identity)

    assault(good, read)


def test_prepared_weights_as_a_start_reads_them(weights: tuple[Path, str, bytes], tmp_path: Path) -> None:
    _, identity, good = weights
    path, chance = tmp_path / "damaged", random.Random(4)
    for _ in range(150):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            load(path, threads=1, expected_id=identity)
    path.write_bytes(good)
    assert load(path, threads=1, expected_id=identity).keys() == {"a", "b"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
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


@fuzz
@given(
    st.one_of(
        changed(RECORD).map(dumped), changed(json.loads(binding_bytes())["record"]).map(dumped), st.binary(max_size=300)
    )
)
def test_records_whose_check_value_holds(body: bytes) -> None:
    for record_type in (ActionRecord, Binding):
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


def test_the_arena_of_the_weights_is_that_of_the_file(weights: tuple[Path, str, bytes]) -> None:
    path, identity, _ = weights
    arena = Arena([("a", (40, 30), "float32"), ("b", (5000,), "uint8")])
    assert load(path, arena, threads=1, expected_id=identity)["a"].shape == (40, 30)
