"""Decides what the next step computes. Holds no tensor, and is tested without a model.

Every step mixes decoding and prefill: first the next token of every sequence that decodes, then prompts in chunks of
what the step still holds. While some decode, steps are kept short, so that a long prompt does not hold them up; prompts
share a step, so that a long one does not hold up short ones either, and the oldest has the largest part. When pages run
out, the youngest sequence gives its pages back and waits again; what it has generated is kept, and what the prefix
cache has kept need not be computed anew. What a policy asks for beyond that is in `policy.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from itertools import islice

from ..compiler.limits import Limits
from .pages import PageAllocator
from .policy import Policy, PrefillGate, Prompts
from .prefix_cache import Chain, PrefixCache
from .request import Generation, Request

_LEAST_CHUNK = 16  # tokens of a prompt, beside older ones
_ALL = Prompts()
_LEAST_TRIMMED = 32  # tokens of a step that is made smaller: below, reading the weights takes longer than computing


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence in a step; `samples` when a new token follows from the last of them."""

    sequence: Generation
    start: int
    count: int
    samples: bool

    @staticmethod
    def of(sequence: Generation, count: int) -> Chunk:
        return Chunk(sequence, sequence.computed, count, sequence.computed + count == sequence.length)


class Scheduler:
    """The queue of waiting requests, the rows in work, and their pages."""

    def __init__(self, limits: Limits, policy: Policy | None = None) -> None:
        assert limits.num_pages > limits.max_pages, "a row of full length must fit, or it would be preempted for ever"
        self.limits, self.policy = limits, policy or Policy()
        self.pages = PageAllocator(limits.num_pages, limits.page_tokens)
        self.prefixes = PrefixCache(self.pages) if self.policy.prefix_caching else None
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.gate = PrefillGate(self.policy)
        self._free_rows = list(reversed(range(limits.max_batch)))
        self._prompts_are_next = False
        self._least_chunk = min(self.policy.least_chunk, limits.token_buckets[-1] // 2)  # more forbids most cuts
        self._most_chunk = max(self.policy.most_chunk, 2 * self._least_chunk) if self.policy.most_chunk else 0
        self._rows_each: int | None = None
        self._answering: list[Generation] = []
        self.preempted = 0
        self.hit_tokens = self.miss_tokens = 0
        """Tokens of prompts that the prefix cache had, and had not."""
        self.hit_pages = 0
        """Pages that requests took from it, also when they came back to work."""

    def add(self, request: Request) -> Generation:
        """Puts a request at the end of the queue."""
        sequence = Generation(request, list(request.prompt))
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most a bucket of tokens in all; empty when there is nothing to do."""
        self._rows_each = None
        answering, self._answering = self._answering, []
        if answering and (chunks := self._decode(self.limits.token_buckets[-1], only=answering)):
            return chunks
        chunks = self._schedule_all()
        if self.policy.first_decode_alone:
            self._answering = [each.sequence for each in chunks if each.samples and each.sequence.is_new]
        return chunks

    def _schedule_all(self) -> list[Chunk]:
        if self._prompts_are_next or not self.policy.in_flight_batching:
            return self._schedule_prompts_first()
        decoding = self._decode(self.limits.token_buckets[-1])
        prompts = self.gate.next_step(len(decoding), len(self.waiting))
        if not self.waiting and len(decoding) == len(self.running):  # as in most steps
            return decoding
        return decoding + self._prefill(self._prompt_budget(len(decoding)), decoding, prompts)

    def _schedule_prompts_first(self) -> list[Chunk]:
        """Steps of either kind in turn; or, once, a prompt that no step has had room for, before decoding."""
        largest = self.limits.token_buckets[-1]
        if self.policy.in_flight_batching:
            self._prompts_are_next = False
            prompts = self._prefill(largest, [])
            taken = {chunk.sequence for chunk in prompts}
            decoding = self._decode(largest - sum(chunk.count for chunk in prompts), taken)
            return [chunk for chunk in prompts if chunk.sequence.row >= 0] + decoding  # some may have been preempted
        allowed = self.gate.next_step(sum(each.pending == 1 for each in self.running), len(self.waiting))
        self._prompts_are_next = not self._prompts_are_next or self.policy.decode_floor is not None
        if self._prompts_are_next:
            return self._prefill(largest, [], allowed) or self._decode(largest)
        return self._decode(largest) or self._prefill(largest, [], allowed)

    # --- decoding ---

    def _decode(
        self, budget: int, taken: Container[Generation] = (), only: Container[Generation] | None = None
    ) -> list[Chunk]:
        """The last token of every sequence that has but one left, oldest first, without those taken already."""
        limit = self.limits.max_length
        free = [each for each in self.running if each not in taken and (only is None or each in only)]
        ready = [each for each in free if each.pending == 1 and each.may_go_on(limit)]
        chosen = []
        for sequence in ready[:budget]:
            if sequence.row >= 0 and self._make_room(sequence):  # else preempted for an older one in this very step
                chosen.append(sequence)
        return [Chunk.of(sequence, 1) for sequence in chosen]

    def _make_room(self, sequence: Generation) -> bool:
        """Gives a running sequence a page for its next token, if need be the youngest's; False if it was that."""
        while needed := self.pages.needed(sequence.pages, sequence.length):
            if needed <= self.pages.free:
                self.pages.extend(sequence.pages, sequence.length)
                break
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    # --- prompts ---

    def _prompt_budget(self, decoding: int) -> int:
        """Tokens of prompts that may go beside so many decoding sequences."""
        buckets = self.limits.token_buckets
        if not decoding or not self.policy.chunked_prefill:
            return buckets[-1] - decoding
        wanted = max(buckets[-1] // 4, 4 * decoding)
        return next((bucket for bucket in buckets if bucket >= wanted), buckets[-1]) - decoding

    def _prefill(self, budget: int, decoding: list[Chunk], allowed: Prompts = _ALL) -> list[Chunk]:
        """Chunks of prompts beside `decoding`: running ones, the oldest first, then waiting ones while rows and pages
        last."""
        counts: dict[Generation, int] = {}
        left = budget
        for sequence in self.running if allowed.begun else ():
            if sequence.pending > 1 and (count := self._share(sequence, left)):
                counts[sequence] = count
                left -= count
        while left and allowed.new and self._has_place() and (count := self._enter(left, bool(decoding))):
            counts[self.running[-1]] = count
            left -= count
        if decoding and self._least_chunk and not counts and any(each.pending > 1 for each in self.running):
            self._prompts_are_next = True  # the room beside decoding may never be enough
        for sequence, count in counts.items():  # what the others have left goes to the oldest
            more = max(self._fitting(sequence, count + left) - count, 0)
            counts[sequence] += more
            left -= more
        if self.policy.chunked_prefill and not self._least_chunk:
            self._trim(counts, len(decoding))
        return [Chunk.of(sequence, count) for sequence, count in counts.items() if count]

    def _has_place(self) -> bool:
        """Whether a request waits for which there is a place."""
        return bool(self.waiting) and self._num_places > 0

    @property
    def _num_places(self) -> int:
        """Further requests that may be in work."""
        most, rows = self.policy.max_running, len(self._free_rows)
        return rows if most is None else min(rows, max(0, most - len(self.running)))

    def _share(self, sequence: Generation, left: int) -> int:
        """Tokens of a prompt that go into a step which has room for `left` more: half of that, and a least chunk."""
        half = max(-(-left // 2), _LEAST_CHUNK)
        return self._fitting(sequence, min(left, half)) or self._fitting(sequence, left)

    def _fitting(self, sequence: Generation, room: int) -> int:
        """The most tokens of a prompt that a chunk may have where there is room for so many; 0 for none."""
        pending = sequence.pending
        if sequence.is_scoring:
            return min(pending, room, self._score_rows())
        if not self.policy.chunked_prefill and pending <= self.limits.token_buckets[-1]:
            return pending if pending <= room else 0
        count = min(pending, room, self._most_chunk or room)
        if count < pending:
            count = min(count, max(pending - self._least_chunk, 1))
        return count if count >= min(self._least_chunk, pending) else 0

    def _score_rows(self) -> int:
        """Rows of logits for the prompt of one request that is scored; every sequence in a step has one at least."""
        if self._rows_each is None:
            entering = min(len(self.waiting), len(self._free_rows))
            waiting = sum(each.request.prompt_logprobs for each in islice(self.waiting, entering))
            scoring = waiting + sum(each.is_scoring for each in self.running)
            self._rows_each = 1 + (len(self._free_rows) - entering) // max(scoring, 1)
        return self._rows_each

    def _enter(self, left: int, beside_decoding: bool) -> int:
        """Makes the request that has waited longest a running one, with pages for all of its tokens.

        Returns how many of its tokens go into this step; 0 when it has to wait on.
        """
        sequence = self.waiting[0]
        if sequence.in_flight:  # preempted in the very step that computes its next token
            return 0
        known, chain = self._known_pages(sequence)
        needed = self.pages.needed(known, sequence.length)
        if needed > self.pages.free - sum(map(self.pages.is_idle, known)) - self._reserve:
            return 0
        sequence.computed = len(known) * self.limits.page_tokens
        count = self._share(sequence, left)
        if not count:
            sequence.computed = 0
            self._prompts_are_next = self._prompts_are_next or beside_decoding
            return 0
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.row, sequence.chain = self._free_rows.pop(), chain
        for page in known:
            self.pages.share(page)
        sequence.pages += known
        self.hit_pages += len(known)
        self.pages.extend(sequence.pages, sequence.length)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.hit_tokens += sequence.computed
            self.miss_tokens += len(sequence.request.prompt) - sequence.computed
        return count

    @property
    def _reserve(self) -> int:
        """Pages that new requests leave to those that run."""
        return int((1 - self.policy.pages_watermark) * self.pages.num_pages) if self.running else 0

    def _known_pages(self, sequence: Generation) -> tuple[list[int], Chain | None]:
        if self.prefixes is None:
            return [], None
        tokens = sequence.tokens
        if sequence.is_scoring:  # what is taken from the cache has no logits
            tokens = tokens[: len(sequence.scores) + 1]
        return self.prefixes.match(sequence.request.cache_salt, tokens)

    def _trim(self, counts: dict[Generation, int], decoding: int) -> None:
        """Cuts a step down to the next smaller bucket where little lies beyond: padding takes as long as tokens."""
        total = decoding + sum(counts.values())
        bucket = max((bucket for bucket in self.limits.token_buckets if bucket <= total), default=0)
        beyond = total - bucket
        if bucket < _LEAST_TRIMMED or beyond > bucket // 2:
            return
        for sequence in reversed(counts):
            cut = min(beyond, counts[sequence])
            counts[sequence] -= cut
            beyond -= cut

    # --- what the engine tells ---

    def keep_prefix(self, sequence: Generation) -> None:
        """Makes known what a running sequence's pages hold by now."""
        if self.prefixes is not None and sequence.chain is not None:
            computed = min(sequence.computed, len(sequence.tokens))
            self.prefixes.add(sequence.chain, sequence.tokens, sequence.pages, computed)

    def preempt(self, sequence: Generation) -> None:
        """Sends a sequence back to the head of the queue, with all that it has generated."""
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def finish(self, sequence: Generation) -> None:
        """Takes a sequence out, running or waiting."""
        if sequence.row >= 0:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Generation) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self._free_rows.append(sequence.row)
        sequence.row, sequence.computed, sequence.chain = -1, 0, None

    def num_waiting(self, more: int = 0) -> int:
        """Requests that the next step has no place for, were there so many more."""
        return max(0, len(self.waiting) + more - self._num_places)

    def pause_s(self) -> float:
        """Seconds in which there is nothing to do, as all that there is are prompts that wait for others."""
        return 0.0 if self.running else self.gate.delay_left_s()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting
