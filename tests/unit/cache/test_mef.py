"""The MEF container: what is written is read back, and no damage is anything but a CacheError."""

import hashlib
import io
import json
import os
import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from max import CacheError
from max.cache import mef
from max.cache.mef import Mef, MefWriter


def make_mef(sections=None) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add_json(mef.MANIFEST, "", {"graphs": ["step_t1"], "buckets": [1, 2]})
        writer.add(mef.MODULE, "text", b"module { } " * 40)
        writer.add(mef.NATIVE, "step_t1", bytes(range(256)) * 3, target="cpu", codec="none")
        writer.finish()
    return file.getvalue()


names = st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))


@given(st.dictionaries(names, st.tuples(st.binary(max_size=300), st.sampled_from(["zstd", "none"])), max_size=5))
def test_round_trip(sections):
    file = io.BytesIO()
    writer = MefWriter(file)
    for (kind, name, target), (data, codec) in sections.items():
        writer.add(kind, name, data, target=target, codec=codec)
    identity = writer.finish()

    opened = Mef.from_bytes(file.getvalue())
    assert opened.id == identity
    assert len(opened.sections()) == len(sections)
    for (kind, name, target), (data, _) in sections.items():
        section = opened.find(kind, name, target)
        assert section is not None and opened.read(section) == data


def test_file_and_memory_agree(tmp_path):
    path = tmp_path / "a.mef"
    with MefWriter(path) as writer:
        writer.add(mef.MODULE, "text", b"module")
        identity = writer.finish()
    opened = Mef.open(path)
    assert opened.id == identity == Mef.from_bytes(path.read_bytes()).id
    assert opened.size == path.stat().st_size
    path.unlink()
    assert opened.read(opened.sections()[0]) == b"module"


def test_equal_inputs_give_equal_bytes_and_other_inputs_another_id():
    assert make_mef() == make_mef()
    file = io.BytesIO()
    MefWriter(file).finish()
    assert Mef.from_bytes(file.getvalue()).id != Mef.from_bytes(make_mef()).id


def test_layout_is_the_documented_one():
    data = make_mef()
    magic, major, minor, header, size, offset, length, digest = struct.unpack_from("<8sHHIQQQ32s", data)
    assert (magic, major, minor, header, size) == (b"\x89MEF\r\n\x1a\n", 1, 1, 4096, len(data))
    assert offset + length == size
    assert hashlib.sha256(data[offset:]).digest() == digest
    assert data[80:112] == hashlib.sha256(data[:80]).digest() and not any(data[112:4096])
    opened = Mef.from_bytes(data)
    assert opened.id == digest.hex()
    for section in opened.sections():
        assert section.offset % (65536 if section.kind == mef.NATIVE else 4096) == 0
        stored = data[section.offset : section.offset + section.stored_bytes]
        assert hashlib.sha256(stored).hexdigest() == section.sha256
    module = opened.find(mef.MODULE, "text")
    assert module is not None and module.codec == "zstd"
    assert zstandard.decompress(data[module.offset : module.offset + module.stored_bytes]) == b"module { } " * 40


def test_compression_that_saves_nothing_is_left_out():
    writer = MefWriter(io.BytesIO())
    assert writer.add(mef.MODULE, "a", os.urandom(100)).codec == "none"
    assert writer.add(mef.MODULE, "b", bytes(1000)).codec == "zstd"


def test_json_sections():
    opened = Mef.from_bytes(make_mef())
    assert opened.json(mef.MANIFEST) == {"graphs": ["step_t1"], "buckets": [1, 2]}
    with pytest.raises(CacheError, match="has no section probe"):
        opened.json(mef.PROBE)
    with pytest.raises(CacheError, match="module/text that is not JSON"):
        opened.json(mef.MODULE, "text")
    assert opened.find(mef.NATIVE, "step_t1", "cuda") is None


def content(data: bytes):
    """What a reader gets from these bytes; CacheError is the only failure allowed."""
    opened = Mef.from_bytes(data)
    opened.check()
    return [(s.kind, s.name, s.target, opened.read(s)) for s in opened.sections()]


def assert_error_or_same(data: bytes, expected) -> None:
    try:
        found = content(data)
    except CacheError as error:
        assert error.message and error.hint
    else:
        assert found == expected


@pytest.mark.slow
def test_every_flipped_byte_is_found():
    """Also between the sections, where it would do no harm: a store that decays is worth knowing of."""
    good = make_mef()
    for place in {*range(200), *range(200, len(good), 97), *range(len(good) - 900, len(good))}:
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(good)
            damaged[place] ^= flip
            with pytest.raises(CacheError):
                content(bytes(damaged))


def test_every_truncation_is_an_error(tmp_path):
    good = make_mef()
    for length in [*range(200), *range(200, len(good), 101), len(good) - 1]:
        with pytest.raises(CacheError):
            Mef.from_bytes(good[:length])
    with pytest.raises(CacheError):
        Mef.from_bytes(good + b"\0")


def test_truncation_after_opening_is_an_error(tmp_path):
    path = tmp_path / "a.mef"
    path.write_bytes(make_mef())
    opened = Mef.open(path)
    os.truncate(path, 5000)
    with pytest.raises(CacheError, match=r"cut short|damaged"):
        [opened.read(section) for section in opened.sections()]


@settings(max_examples=2 * settings().max_examples)
@given(st.binary(max_size=200), st.integers(0, 120))
def test_random_header_bytes_never_surprise(noise, place):
    good = bytearray(make_mef())
    good[place : place + len(noise)] = noise
    assert_error_or_same(bytes(good), content(make_mef()))


def with_table(toc: bytes, **header) -> bytes:
    """A MEF whose table is consistent with its sha256, as a hostile writer would make it."""
    body = bytes(100)
    fields = {"major": 1, "minor": 1, "header": 4096, "critical": 0, "optional": 0} | header
    packed = struct.pack(
        "<8sHHIQQQ32sII",
        mef.MAGIC,
        fields["major"],
        fields["minor"],
        fields["header"],
        4096 + len(body) + len(toc),
        fields.get("offset", 4096 + len(body)),
        fields.get("length", len(toc)),
        hashlib.sha256(toc).digest(),
        fields["optional"],
        fields["critical"],
    )
    return sealed(packed) + body + toc


def sealed(packed: bytes) -> bytes:
    """A header with its own sha256."""
    return (packed + hashlib.sha256(packed).digest()).ljust(4096, b"\0")


def entry(**changes) -> bytes:
    fields = {
        "id": 0,
        "kind": "module",
        "name": "",
        "target": "",
        "offset": 4096,
        "stored_bytes": 100,
        "raw_bytes": 100,
        "codec": "none",
        "sha256": hashlib.sha256(bytes(100)).hexdigest(),
    } | changes
    return mef.canonical_json([fields])


def test_a_consistent_table_is_accepted_and_unknown_fields_are_skipped():
    assert content(with_table(entry(kind="of-a-later-version", later=[1, 2]), minor=9, optional=5)) == [
        ("of-a-later-version", "", "", bytes(100))
    ]


@pytest.mark.parametrize(
    "data",
    [
        with_table(entry(), major=2),
        with_table(entry(), minor=0),
        with_table(entry(), length=10),
        with_table(mef.canonical_json([json.loads(entry())[0], json.loads(entry(name="again"))[0]])),
        with_table(entry(), critical=1),
        with_table(entry(), header=100),
        with_table(entry(), header=1 << 30),
        with_table(entry(), offset=1 << 62),
        with_table(entry(), length=1 << 62),
        with_table(entry(), offset=(1 << 64) - 1, length=(1 << 64) - 1),
        with_table(b"[" * 100_000),
        with_table(b'"\xff\xfe"'),
        with_table(b"{}"),
        with_table(entry(offset=-1)),
        with_table(entry(offset=10)),
        with_table(entry(offset=1 << 70)),
        with_table(entry(stored_bytes=1 << 40)),
        with_table(entry(stored_bytes=-100)),
        with_table(entry(raw_bytes=1 << 60)),
        with_table(entry(raw_bytes=-1)),
        with_table(entry(raw_bytes=101)),
        with_table(entry(codec="brotli")),
        with_table(entry(codec="zstd")),
        with_table(entry(sha256="")),
        with_table(entry(name=7)),
        with_table(entry()[:-1] + b"," + entry()[1:]),
    ],
)
def test_hostile_tables_are_cache_errors(tmp_path, data):
    with pytest.raises(CacheError):
        content(data)
    path = tmp_path / "a.mef"
    path.write_bytes(data)
    with pytest.raises(CacheError):
        Mef.open(path).check()


def test_newer_versions_are_named():
    with pytest.raises(CacheError, match=r"has format 2.3, and this version reads 1.x from 1.1"):
        Mef.from_bytes(with_table(entry(), major=2, minor=3))


@pytest.mark.parametrize(("real", "claimed"), [(200 << 20, 1000), (1000, 3 << 30), (200 << 20, 3 << 30)])
def test_memory_stays_near_what_is_really_there(real, claimed):
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(real))
    claims = {"stored_bytes": len(packed), "raw_bytes": claimed, "codec": "zstd"}
    toc = entry(**claims, sha256=hashlib.sha256(packed).hexdigest())
    header = struct.pack(
        "<8sHHIQQQ32sII",
        mef.MAGIC, 1, 1, 4096, 4096 + len(packed) + len(toc), 4096 + len(packed), len(toc),
        hashlib.sha256(toc).digest(), 0, 0,
    )  # fmt: skip
    opened = Mef.from_bytes(sealed(header) + packed + toc)
    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match="bytes long"):
            opened.read(opened.sections()[0])
        assert tracemalloc.get_traced_memory()[1] < min(real, claimed) * 1.3 + (16 << 20)
    finally:
        tracemalloc.stop()


def test_a_section_that_honestly_unpacks_to_too_much_is_refused(monkeypatch):
    data = make_mef()
    monkeypatch.setattr(mef, "MAX_RAW_BYTES", 439)
    with pytest.raises(CacheError, match="module/text of 440 bytes"):
        Mef.from_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_paths_that_are_no_file(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "missing"
    with pytest.raises(CacheError):
        Mef.open(path)


def test_an_unfinished_file_is_not_a_mef(tmp_path):
    path = tmp_path / "a.mef"
    with MefWriter(path) as writer:
        writer.add(mef.MODULE, "text", bytes(10_000), codec="none")
    with pytest.raises(CacheError, match="not a MEF file"):
        Mef.open(path)
