"""Pages have one owner, come back, and are handed out lowest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max import CapacityError
from max.runtime.pages import PageAllocator


def test_lowest_pages_first_and_never_page_zero():
    allocator = PageAllocator(num_pages=6, page_tokens=4)
    first, second = [], []
    allocator.extend(first, 5)
    allocator.extend(second, 4)
    assert (first, second, allocator.free) == ([1, 2], [3], 2)
    allocator.release(first)
    allocator.extend(second, 9)
    assert (first, second, allocator.free) == ([], [3, 1, 2], 2)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_needed_rounds_up_to_whole_pages(tokens, pages):
    allocator = PageAllocator(num_pages=9, page_tokens=4)
    assert allocator.needed([], tokens) == pages
    assert allocator.needed([1], tokens) == max(0, pages - 1)


def test_refuses_whole_or_not_at_all():
    allocator = PageAllocator(num_pages=4, page_tokens=2)
    held = []
    allocator.extend(held, 2)
    with pytest.raises(CapacityError, match="3 pages are needed and 2 are free"):
        allocator.extend(held, 8)
    assert (held, allocator.free) == ([1], 2)


@given(
    num_pages=st.integers(1, 12),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.booleans()), max_size=40),
)
def test_every_page_is_free_or_held_once(num_pages, moves):
    allocator = PageAllocator(num_pages, page_tokens=2)
    held: list[list[int]] = [[], [], [], []]
    for owner, tokens, release in moves:
        if release:
            allocator.release(held[owner])
        elif allocator.needed(held[owner], tokens) <= allocator.free:
            allocator.extend(held[owner], tokens)
            assert len(held[owner]) * 2 >= tokens
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(1, num_pages))
        assert len(owned) + allocator.free == num_pages - 1
