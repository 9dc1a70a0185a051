"""Damage and full, closed or foreign cache folders: one warning, the right text, and a sound cache afterwards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from max.cache import mef
from max.cache.config import CacheConfig
from max.cache.key import Key
from max.cache.store import Store


def only_file(folder: Path) -> Path:
    """The one file below a folder."""
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def flip_native(cache: Path) -> None:
    blob = only_file(cache / "blobs")
    section = next(each for each in mef.Mef.open(blob).sections() if each.kind == mef.NATIVE)
    flip(blob, section.offset + section.stored_bytes // 2)


def flip_table(cache: Path) -> None:
    flip(only_file(cache / "blobs"), -20)


def truncate_artifact(cache: Path) -> None:
    blob = only_file(cache / "blobs")
    os.truncate(blob, blob.stat().st_size // 2)


def exchange_artifact(cache: Path) -> None:
    """Puts a sound artifact of something else in its place."""
    with mef.MefWriter(only_file(cache / "blobs")) as writer:
        writer.add_json(mef.MANIFEST, "", {"name": "another"})
        writer.finish()


def overwrite_artifact(cache: Path) -> None:
    only_file(cache / "blobs").write_bytes(b"#!/bin/sh\necho no artifact\n" * 500)


def remove_artifact(cache: Path) -> None:
    only_file(cache / "blobs").unlink()


def damage_index(cache: Path) -> None:
    flip(only_file(cache / "index"), 100)


def damage_binding(cache: Path) -> None:
    only_file(cache / "bindings").write_text("{}")


def flip_weights(cache: Path) -> None:
    flip(only_file(cache / "prepared"), -1000)


def truncate_weights(cache: Path) -> None:
    weights = only_file(cache / "prepared")
    os.truncate(weights, weights.stat().st_size - 4096)


def misalign_weights(cache: Path) -> None:
    weights = only_file(cache / "prepared")
    weights.write_bytes(b"\0" + weights.read_bytes())


def exchange_weights(cache: Path) -> None:
    """Sound weights of another packing, under the name of the right ones."""
    weights = only_file(cache / "prepared")
    content = bytearray(weights.read_bytes())
    (offset, size) = struct.unpack_from("<QQ", content, 24)
    toc = content[offset : offset + size].replace(b"-v", b"-w")
    content[offset:] = toc
    content[40:72] = hashlib.sha256(toc).digest()
    weights.write_bytes(content)


def foreign_code(cache: Path) -> None:
    """An artifact whose hashes all fit, with code that XLA does not take, under the key of the sound one."""
    blob, index = only_file(cache / "blobs"), only_file(cache / "index")
    record = json.loads(index.read_text())["record"]
    sound = mef.Mef.open(blob)

    def write(path: Path) -> None:
        with mef.MefWriter(path) as writer:
            for each in sound.sections():
                data = b"no code" if each.kind == mef.NATIVE else sound.read(each)
                writer.add(each.kind, each.name, data, target=each.target)
            writer.finish()

    assert Store.open(CacheConfig(cache_dir=cache)).publish(Key(record["key"], record["factors"]), write)
    blob.unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_native, "compiled"),
    (flip_table, "compiled"),
    (truncate_artifact, "compiled"),
    (exchange_artifact, "compiled"),
    (overwrite_artifact, "compiled"),
    (remove_artifact, "compiled"),
    (foreign_code, "compiled"),
    (damage_index, "compiled"),
    (damage_binding, "same shape"),
    (flip_weights, "same shape"),
    (truncate_weights, "same shape"),
    (misalign_weights, "same shape"),
    (exchange_weights, "same shape"),
]
"""Each damage, and how the start after it comes by its artifact."""


@pytest.fixture(scope="session")
def text(run, model: Path, filled_cache: Path, small) -> str:
    """What a sound cache gives."""
    place = ("--model", str(model), "--cache-dir", str(filled_cache), *small)
    return run("generate", *place, "--prompt", "hello", "--seed", "1").out


@pytest.fixture
def start(call, model: Path, small, caplog) -> Callable[..., tuple[str, str, list[str]]]:
    """Generates with a cache; returns the text, where the artifact came from, and the warnings."""

    def start_with(cache: Path, *arguments: str) -> tuple[str, str, list[str]]:
        caplog.clear()
        place = ("--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1")
        done = call("generate", *place, "--json", *arguments)
        assert done.code == 0, done.err
        warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        found = json.loads(done.out)
        return found["text"] + "\n", found["source"], warnings

    return start_with


@pytest.mark.parametrize(("damage", "source"), DAMAGES, ids=lambda each: getattr(each, "__name__", ""))
def test_damage_is_told_once_and_made_good(start, cache: Path, text: str, damage, source: str) -> None:
    damage(cache)
    found, came_from, warnings = start(cache)
    assert (found, came_from) == (text, source)
    assert len(warnings) == 1 and warnings[0].startswith("damaged cache entry, made again: "), warnings
    assert start(cache) == (text, "bound", [])


@pytest.mark.parametrize("damage", [flip_native, flip_weights], ids=lambda each: each.__name__)
def test_damage_in_a_cache_that_is_only_read(start, cache: Path, text: str, damage) -> None:
    damage(cache)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    found, _, warnings = start(cache, "--cache-policy", "readonly")
    assert found == text and len(warnings) == 1, warnings
    assert before == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_damage_where_a_hit_is_required(call, small, model: Path, cache: Path) -> None:
    flip_native(cache)
    place = ("--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello")
    done = call("generate", *place, "--cache-policy", "require")
    assert done.code == 2 and done.out == ""
    assert [line.partition(":")[0] for line in done.errors] == ["error", "hint"]


@pytest.fixture(params=["a file", "in /proc", "read-only", "of a later layout", "open to everybody"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that cannot be filled."""
    folder = tmp_path / "cache"
    match request.param:
        case "a file":
            folder.write_text("")
        case "in /proc":
            return Path("/proc/self/cache")
        case "read-only":
            # Tests may run as root, which may write anywhere.
            monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        case "of a later layout":
            folder.mkdir(0o700)
            (folder / "VERSION").write_text("2\n")
        case "open to everybody":
            folder.mkdir()
            folder.chmod(0o777)
    return folder


def test_a_cache_that_cannot_be_filled(start, text: str, unusable: Path) -> None:
    found, source, warnings = start(unusable)
    assert (found, source) == (text, "compiled") and len(warnings) == 1, warnings
    assert str(unusable) in warnings[0]


def test_a_full_disk(start, small, model: Path, tmp_path: Path, text: str) -> None:
    """A limit on the size of files stands for the disk: artifact and weights are larger, all else is smaller."""
    cache = tmp_path / "cache"
    place = ["--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1"]
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", sys.executable, "-m", "max", "generate", *place]
    done = subprocess.run(limited, cwd="/", capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, text)
    assert len([line for line in done.stderr.splitlines() if line.startswith("WARNING")]) == 1, done.stderr
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["VERSION"]
    assert start(cache) == (text, "compiled", [])
    assert start(cache) == (text, "bound", [])


def test_an_emptied_cache_is_filled_again(start, cache: Path, text: str) -> None:
    for name in ("blobs", "prepared", "quarantine"):
        shutil.rmtree(cache / name)
    found, source, warnings = start(cache)
    assert (found, source) == (text, "compiled") and len(warnings) <= 1, warnings
    assert start(cache) == (text, "bound", [])
