"""Which pages of the key-value pool belong to whom. Holds no tensor.

A page is free, or in use by one request or several that share it, or idle: no request uses it, but what it holds may be
wanted again. Idle pages are given out only when there are no free ones, the one longest unused first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from .. import CapacityError


class PageAllocator:
    """Hands out the lowest free pages first, so that memory which was never needed is never touched.

    Page 0 takes the writes of padding tokens and is never handed out.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.num_pages = num_pages - 1
        self._free = list(range(1, num_pages))
        self._users: dict[int, int] = {}
        self._kept: dict[int, Callable[[int], None]] = {}
        self._idle: dict[int, None] = {}
        """In the order of their last use."""

    @property
    def free(self) -> int:
        """Pages that can be handed out, idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def needed(self, pages: Sequence[int], tokens: int) -> int:
        """How many more pages hold `tokens` tokens than `pages` are."""
        return max(0, -(-tokens // self.page_tokens) - len(pages))

    def extend(self, pages: list[int], tokens: int) -> None:
        """Appends pages until they hold `tokens` tokens; raises CapacityError, taking none, when too few are free."""
        needed = self.needed(pages, tokens)
        if needed > self.free:
            raise CapacityError(f"{needed} pages are needed and {self.free} are free", "Wait for a request to finish.")
        for _ in range(needed):
            page = heapq.heappop(self._free) if self._free else self._evict()
            self._users[page] = 1
            pages.append(page)

    def _evict(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept.pop(page)(page)
        return page

    def share(self, page: int) -> None:
        """Gives a page that is in use or idle one more user."""
        self._idle.pop(page, None)
        self._users[page] = self._users.get(page, 0) + 1

    def release(self, pages: list[int]) -> None:
        """Takes one user from all pages and empties the list; the last page counts as the one longest unused."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._kept:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._free, page)
        pages.clear()

    def keep(self, page: int, evicted: Callable[[int], None]) -> None:
        """Makes a page in use idle, not free, when its last user has gone; `evicted` is called when it is given out."""
        assert page in self._users
        self._kept[page] = evicted

    def forget(self, page: int) -> None:
        """Takes back `keep`: an idle page is free at once."""
        del self._kept[page]
        if page in self._idle:
            del self._idle[page]
            heapq.heappush(self._free, page)
