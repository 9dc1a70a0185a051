"""docs/mef.md is the format: the plain reader printed there reads what the writer writes, and finds what it finds."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from max import CacheError
from max.cache import mef
from max.cache.mef import Mef, MefWriter

DOCUMENT = (Path(__file__).parents[3] / "docs" / "mef.md").read_text()
CODE = "".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))


@pytest.fixture(scope="module")
def reader() -> dict:
    names: dict = {"__name__": "reader"}
    exec(compile(CODE, "docs/mef.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def good() -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add_json(mef.MANIFEST, "", {"graphs": ["step_t1"], "buckets": [1, 2]})
        writer.add(mef.MODULE, "text", b"module { } " * 400)
        writer.add(mef.NATIVE, "step_t1", bytes(range(256)) * 3, target="cpu", codec="none")
        writer.finish()
    return file.getvalue()


def test_it_is_short_and_plain() -> None:
    assert 40 <= len([line for line in CODE.splitlines() if line.strip()]) <= 66
    assert set(re.findall(r"import (\w+)", CODE)) == {"hashlib", "json", "struct", "sys", "zstandard"}


def test_it_reads_what_is_written(reader, good: bytes) -> None:
    identity, sections = reader["read_mef"](good)
    opened = Mef.from_bytes(good)
    assert identity == opened.id
    assert [(s["kind"], s["name"], s["target"]) for s, _ in sections] == [
        (s.kind, s.name, s.target) for s in opened.sections()
    ]
    assert [reader["unpack"](*each) for each in sections] == [opened.read(s) for s in opened.sections()]


def test_it_finds_the_same_damage(reader, good: bytes) -> None:
    for place in {*range(130), *range(4096, len(good), 251)}:
        damaged = bytearray(good)
        damaged[place] ^= 0x20
        with pytest.raises(ValueError):
            reader["read_mef"](bytes(damaged))
        with pytest.raises(CacheError):
            Mef.from_bytes(bytes(damaged)).check()
    for length in range(0, len(good), 997):
        with pytest.raises(ValueError):
            reader["read_mef"](good[:length])


def test_it_is_a_program(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(CODE)
    (tmp_path / "a.mef").write_bytes(good)
    command = [sys.executable, "-S", "reader.py", "a.mef"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == Mef.from_bytes(good).id and " native step_t1 cpu" in done.stdout


def test_every_kind_is_described() -> None:
    kinds = [mef.MANIFEST, mef.COMPAT, mef.MODULE, mef.JAXPR, mef.NATIVE, mef.SIGNATURES, mef.WEIGHTS]
    kinds += [mef.CUSTOM_CALLS, mef.MEMORY, mef.COST, mef.PROBE, mef.PROVENANCE]
    assert not [kind for kind in kinds if f"`{kind}`" not in DOCUMENT]
