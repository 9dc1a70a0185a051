"""Decides what the next step computes. Holds no tensor, and is tested without a model.

Every step mixes decoding and prefill: running sequences first, oldest first, each with its next tokens (a long prompt
in chunks of what the step still holds), then new ones while rows and pages last. When pages run out, the youngest
sequence gives its pages back and waits again; what it has generated is kept and computed anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..compiler.limits import Limits
from .pages import PageAllocator
from .request import Generation, Request


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence in a step; `samples` when a new token follows from the last of them."""

    sequence: Generation
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """The queue of waiting requests, the rows in work, and their pages."""

    def __init__(self, limits: Limits) -> None:
        assert limits.num_pages > limits.max_pages, "a row of full length must fit, or it would be preempted for ever"
        self.limits = limits
        self.pages = PageAllocator(limits.num_pages, limits.page_tokens)
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._free_rows = list(reversed(range(limits.max_batch)))
        self.preempted = 0

    def add(self, request: Request) -> Generation:
        """Puts a request at the end of the queue."""
        sequence = Generation(request, list(request.prompt))
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most a bucket of tokens in all; empty when there is nothing to do."""
        budget = self.limits.token_buckets[-1]
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for an older one in this very step
                continue
            count = min(sequence.pending, budget)
            if self._make_room(sequence, count):
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        while self.waiting and budget and self._free_rows:
            sequence = self.waiting[0]
            count = min(sequence.pending, budget)
            # Room for its first chunk is not enough: it would be preempted, and begin again, at each of the next steps.
            if self.pages.needed([], sequence.pending) > self.pages.free:
                break
            self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            self.running.append(sequence)
            self.pages.extend(sequence.pages, count)
            chunks.append(Chunk(sequence, 0, count))
            budget -= count
        return chunks

    def _make_room(self, sequence: Generation, count: int) -> bool:
        """Gives a running sequence pages for `count` more tokens, if need be the youngest's; False if it was that."""
        end = sequence.computed + count
        while self.pages.needed(sequence.pages, end) > self.pages.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        self.pages.extend(sequence.pages, end)
        return True

    def preempt(self, sequence: Generation) -> None:
        """Sends a sequence back to the head of the queue; it will be computed from its first token again."""
        self._leave(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def finish(self, sequence: Generation) -> None:
        """Takes a sequence out, running or waiting."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Generation) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self._free_rows.append(sequence.row)
        sequence.row = -1

    @property
    def num_waiting(self) -> int:
        """Requests beyond those that the next step may take up: there is no row for them."""
        return max(0, len(self.waiting) - len(self._free_rows))

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting
