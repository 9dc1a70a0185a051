"""Finds pages that hold the keys and values of a prompt's beginning, so that they need not be computed again.

Only full pages are shared, and nobody writes to a full page. A page is known by the page before it and its own tokens,
compared in full: equal pages are reached by equal beginnings only, and no hash can collide. The chain begins at a salt,
which keeps apart what must not be shared. Pages that no request uses stay until the allocator needs them.
Source: the block table of PagedAttention (arXiv:2309.06180, section 4.4) with the tree of RadixAttention
(arXiv:2312.07104, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .pages import PageAllocator

_Link = int | str
"""What comes before a page: the number of the known page before it, or the salt at the beginning."""


@dataclass
class Chain:
    """How far a request's pages are known: `pages` of them, of which `link` is the last."""

    link: _Link
    pages: int = 0


class PrefixCache:
    """The pages of an allocator whose tokens are known."""

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._found: dict[tuple[_Link, bytes], tuple[int, int]] = {}
        """(what comes before, tokens) -> (page, its number)"""
        self._keys: dict[int, tuple[_Link, bytes]] = {}
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, salt: str, tokens: Sequence[int]) -> tuple[list[int], Chain]:
        """The pages that hold the beginning of `tokens`, all but one at most, and the chain that they make.

        One token is left to compute, since its logits are wanted. The pages have no new user yet.
        """
        size = self._pages.page_tokens
        chain, pages = Chain(salt), []
        while (chain.pages + 1) * size < len(tokens):
            found = self._found.get((chain.link, _bytes(tokens, chain.pages, size)))
            if found is None:
                break
            page, chain.link = found
            chain.pages += 1
            pages.append(page)
        return pages, chain

    def add(self, chain: Chain, tokens: Sequence[int], pages: Sequence[int], computed: int) -> None:
        """Makes known the pages of a request that are full with its first `computed` tokens, and moves its chain on.

        Where another request has made the same page known, that one stays, and this request's own is not kept.
        """
        size = self._pages.page_tokens
        while (chain.pages + 1) * size <= computed:
            key = (chain.link, _bytes(tokens, chain.pages, size))
            found = self._found.get(key)
            if found is None:
                page = pages[chain.pages]
                found = self._found[key] = (page, self._next_number)
                self._next_number += 1
                self._keys[page] = key
                self._pages.keep(page, self._evicted)
            chain.link = found[1]
            chain.pages += 1

    def _evicted(self, page: int) -> None:
        del self._found[self._keys.pop(page)]

    def reset(self) -> int:
        """Forgets all pages, those in use too; returns how many no request used."""
        idle = self._pages.idle
        for page in self._keys:
            self._pages.forget(page)
        self._found.clear()
        self._keys.clear()
        return idle


def _bytes(tokens: Sequence[int], index: int, size: int) -> bytes:
    return np.asarray(tokens[index * size : (index + 1) * size], np.int32).tobytes()
