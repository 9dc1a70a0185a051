"""The arena: its placement and pages, as the kernel reports them, and what happens when there is no room."""

import gc
import logging
import mmap
from pathlib import Path

import numpy as np
import pytest

from max import CapacityError
from max.runtime import arena as arena_module
from max.runtime.arena import ALIGNMENT, HUGE_PAGE_BYTES, Arena, place

LAYOUT = [("a", (3, 5), "float32"), ("empty", (0, 4), "float32"), ("b", (4096,), "uint8"), ("c", (1,), "float64")]


def test_tensors_lie_in_order_at_aligned_offsets() -> None:
    slots = place(LAYOUT)
    assert [(slot.name, slot.offset) for slot in slots] == [("a", 0), ("empty", 4096), ("b", 4096), ("c", 8192)]
    arena = Arena(LAYOUT)
    assert arena.slots == slots and arena.nbytes == 3 * ALIGNMENT == arena.memory.nbytes
    assert arena.memory.ctypes.data % HUGE_PAGE_BYTES == 0
    assert {name: (view.shape, view.dtype) for name, view in arena.views().items()} == {
        name: (shape, np.dtype(dtype)) for name, shape, dtype in LAYOUT
    }


def test_views_are_the_arena_s_own_zeroed_memory_and_keep_it_alive() -> None:
    arena = Arena(LAYOUT)
    assert not arena.memory.any()
    view = arena.view("c")
    view[0] = 7.0
    assert arena.memory[8192:8200].view(np.float64)[0] == 7.0
    with pytest.raises(KeyError):
        arena.view("d")
    del arena
    gc.collect()
    assert view[0] == 7.0


def test_an_empty_layout_is_an_empty_arena() -> None:
    assert Arena([]).nbytes == 0 and Arena([]).views() == {}


def mapping_of(address: int) -> str:
    """The kernel's report on the mapping that holds an address: its first line and its flags."""
    with open("/proc/self/smaps") as report:
        first = ""
        for line in report:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(bound, 16) for bound in head.split("-"))
                first = line if low <= address < high else ""
            elif first and head == "VmFlags:":
                return first + line
    raise LookupError(hex(address))


def test_the_kernel_sees_private_memory_that_wants_huge_pages() -> None:
    arena = Arena([("a", (8 << 20,), "uint8")])
    first, flags = mapping_of(arena.memory.ctypes.data).splitlines()
    assert first.split()[1] == "rw-p"
    assert "hg" in flags.split()


def test_refused_huge_pages_are_said_once_and_the_arena_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arena_module._warn_once.cache_clear()
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Arena(LAYOUT).view("a")[:] = 1
    assert [record.getMessage().split()[0] for record in caplog.records] == ["huge_pages=refused"]


def test_a_machine_that_says_never_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arena_module._warn_once.cache_clear()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(arena_module, "_HUGE_PAGES", tmp_path / "enabled")
    Arena(LAYOUT)
    assert "says never" in caplog.text


@pytest.mark.parametrize(("kilobytes", "said"), [(0, True), (32 << 10, True), (96 << 10, False)])
def test_what_was_got_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kilobytes: int, said: bool
) -> None:
    arena_module._warn_once.cache_clear()
    (tmp_path / "rollup").write_text(f"Rss: 1 kB\nAnonHugePages:  {kilobytes} kB\n")
    monkeypatch.setattr(arena_module, "_ROLLUP", tmp_path / "rollup")
    Arena([("a", (128 << 20,), "uint8")]).check_huge_pages()
    assert ("of 128 MiB are in huge pages" in caplog.text) is said
    caplog.clear()
    Arena([("a", (1 << 20,), "uint8")]).check_huge_pages()
    monkeypatch.setattr(arena_module, "_ROLLUP", tmp_path / "absent")
    Arena([("a", (128 << 20,), "uint8")]).check_huge_pages()
    assert not caplog.text
    assert (arena_module._huge_bytes() or 0) == 0


def test_no_room_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="no memory for"):
        Arena([("a", (1 << 60,), "float32")])
    with pytest.raises(CapacityError, match="no memory for"):
        Arena([("a", (1 << 70,), "float32")])
