"""The prefix cache and the allocator under it, by hand and under any order of uses."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from max.runtime.pages import PageAllocator
from max.runtime.prefix_cache import Chain, PrefixCache


def fill(cache: PrefixCache, pages: PageAllocator, tokens: list[int], salt: str = "") -> list[int]:
    """What a request does that computes all its tokens and ends; the pages it had."""
    known, chain = cache.match(salt, tokens)
    for page in known:
        pages.share(page)
    held = list(known)
    pages.extend(held, len(tokens))
    cache.add(chain, tokens, held, len(tokens))
    had = list(held)
    pages.release(held)
    return had


def make(num_pages: int = 9) -> tuple[PrefixCache, PageAllocator]:
    pages = PageAllocator(num_pages, 2)
    return PrefixCache(pages), pages


def test_full_pages_are_found_up_to_the_first_difference():
    cache, pages = make()
    assert fill(cache, pages, [1, 2, 3, 4, 5]) == [1, 2, 3]
    assert cache.match("", [1, 2, 3, 4, 9, 9])[0] == [1, 2]
    assert cache.match("", [1, 2, 7, 4, 5])[0] == [1]
    assert cache.match("", [7, 2, 3, 4, 5])[0] == []
    assert cache.match("", [3, 4, 5])[0] == [], "the same tokens behind others"
    assert pages.free == 8


def test_one_token_at_least_is_left_to_compute():
    cache, pages = make()
    fill(cache, pages, [1, 2, 3, 4])
    assert cache.match("", [1, 2, 3, 4])[0] == [1]
    assert cache.match("", [1, 2, 3, 4, 5])[0] == [1, 2]
    assert cache.match("", [1])[0] == []


def test_salts_keep_equal_tokens_apart():
    cache, pages = make()
    fill(cache, pages, [1, 2, 3], "a")
    assert cache.match("b", [1, 2, 3])[0] == []
    assert cache.match("", [1, 2, 3])[0] == []
    assert cache.match("a", [1, 2, 3])[0] == [1]


def test_pages_longest_unused_go_first_and_a_beginning_outlives_its_continuations():
    cache, pages = make(5)
    fill(cache, pages, [1, 2, 3, 4])
    fill(cache, pages, [5, 6, 7, 8])
    fill(cache, pages, [1, 2, 9])  # uses [1, 2] once more
    held: list[int] = []
    pages.extend(held, 2)
    assert cache.match("", [1, 2, 3, 4, 0])[0] == [1], "[3, 4] has gone"
    pages.extend(held, 6)
    assert cache.match("", [5, 6, 7, 8, 0])[0] == []
    assert cache.match("", [1, 2, 0])[0] == [1]
    pages.extend(held, 8)
    assert len(cache) == 0


def test_a_page_in_use_is_never_given_out():
    cache, pages = make(4)
    fill(cache, pages, [1, 2, 3])
    known, _ = cache.match("", [1, 2, 9])
    pages.share(known[0])
    held: list[int] = []
    pages.extend(held, 4)
    assert pages.free == 0
    assert not set(held) & set(known)


def test_of_two_equal_pages_the_first_is_kept():
    cache, pages = make()
    held: list[list[int]] = [[], []]
    chains = [Chain(""), Chain("")]
    for mine, chain in zip(held, chains, strict=True):
        pages.extend(mine, 2)
        cache.add(chain, [1, 2], mine, 2)
    assert chains[0].link == chains[1].link
    pages.release(held[1])
    assert (pages.idle, len(cache)) == (0, 1)
    assert cache.match("", [1, 2, 3])[0] == [1]


def test_reset_forgets_pages_in_use_as_well():
    cache, pages = make()
    fill(cache, pages, [1, 2, 3])
    held: list[int] = []
    pages.extend(held, 2)
    cache.add(Chain(""), [8, 9], held, 2)
    assert cache.reset() == 1
    assert cache.match("", [1, 2, 3])[0] == cache.match("", [8, 9, 3])[0] == []
    pages.release(held)
    assert (pages.free, pages.idle) == (8, 0)


class Requests(RuleBasedStateMachine):
    """Requests come, write their tokens into their pages one page at a time, and end in any order.

    `content` is what would stand in memory: a page is written by whoever got it fresh, and never while another reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.pages = make(7)
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.running: list[tuple[str, list[int], list[int], Chain, int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from(["", "salt"]))
    def begin(self, tokens, salt):
        known, chain = self.cache.match(salt, tokens)
        for place, page in enumerate(known):
            assert self.content[page] == (salt, tuple(tokens[: 2 * place + 2])), "another beginning was found"
        needed = self.pages.needed(known, len(tokens))
        if needed > self.pages.free - sum(map(self.pages.is_idle, known)):
            return
        for page in known:
            self.pages.share(page)
        held = list(known)
        self.pages.extend(held, len(tokens))
        for page in held[len(known) :]:
            assert all(page not in other[2] for other in self.running), "a page in use was given out"
            self.content[page] = ("", ())
        self.running.append((salt, tokens, held, chain, 2 * len(known)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def compute(self, data):
        index = data.draw(st.integers(0, len(self.running) - 1))
        salt, tokens, held, chain, computed = self.running[index]
        computed = data.draw(st.integers(computed, len(tokens)))
        for place in range(computed // 2):
            self.content[held[place]] = (salt, tuple(tokens[: 2 * place + 2]))
        self.cache.add(chain, tokens, held, computed)
        self.running[index] = (salt, tokens, held, chain, computed)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        self.pages.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))[2])

    @rule()
    def reset(self):
        idle = self.pages.idle
        assert self.cache.reset() == idle

    @invariant()
    def every_page_is_in_use_or_free(self):
        used = {page for _, _, held, _, _ in self.running for page in held}
        assert len(used) + self.pages.free == 6
        assert self.pages.idle <= len(self.cache) <= 6


Requests.TestCase.settings = settings(max_examples=settings().max_examples * 3 // 5, stateful_step_count=40)
TestRequests = Requests.TestCase
