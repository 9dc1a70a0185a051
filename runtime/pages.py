"""Which pages of the key-value pool belong to whom. Holds no tensor."""

from __future__ import annotations

import heapq

from .. import CapacityError


class PageAllocator:
    """Hands out the lowest free pages first, so that memory which was never needed is never touched.

    Page 0 takes the writes of padding tokens and is never handed out.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._free = list(range(1, num_pages))

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, pages: list[int], tokens: int) -> int:
        """How many more pages hold `tokens` tokens than `pages` are."""
        return max(0, -(-tokens // self.page_tokens) - len(pages))

    def extend(self, pages: list[int], tokens: int) -> None:
        """Appends pages until they hold `tokens` tokens; raises CapacityError, taking none, when too few are free."""
        needed = self.needed(pages, tokens)
        if needed > self.free:
            raise CapacityError(f"{needed} pages are needed and {self.free} are free", "Wait for a request to finish.")
        pages.extend(heapq.heappop(self._free) for _ in range(needed))

    def release(self, pages: list[int]) -> None:
        """Takes all pages back and empties the list."""
        for page in pages:
            heapq.heappush(self._free, page)
        pages.clear()
