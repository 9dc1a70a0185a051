"""Damage by the thousand: every flipped byte and every truncation is reported."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from max import CacheError
from max.cache.binding import Binding
from max.cache.mef import Mef
from max.runtime.arena import Arena
from max.runtime.prepared import load
from max.runtime.prepared_format import check_file

FLIPS = 100 * settings().max_examples
TRUNCATIONS = FLIPS // 10


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


def test_an_artifact(mef_bytes: bytes) -> None:
    assault(mef_bytes, lambda data: Mef.from_bytes(data).check())


def test_a_binding(binding_bytes: bytes) -> None:
    assault(binding_bytes, Binding.decoded)


def test_prepared_weights(weights: tuple[Path, str, bytes], tmp_path: Path) -> None:
    _, identity, good = weights
    path = tmp_path / "damaged"
    with path.open("wb") as file:

        def read(data: bytes) -> None:
            # Written over: a file system may bring a file to the disk each time that it is emptied and written.
            os.pwrite(file.fileno(), data, 0)
            os.ftruncate(file.fileno(), len(data))
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


def test_the_arena_of_the_weights_is_that_of_the_file(weights: tuple[Path, str, bytes]) -> None:
    path, identity, _ = weights
    arena = Arena([("a", (40, 30), "float32"), ("b", (5000,), "uint8")])
    assert load(path, arena, threads=1, expected_id=identity)["a"].shape == (40, 30)
