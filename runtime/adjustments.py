"""What requests change about their logits, kept from one token to the next: what occurred so far, and biases.

Two arrays as wide as the vocabulary, a row for each request that needs one. They are shared with the sampler graphs and
written where something changes only; memory is taken for rows that were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .arena import lazy_zeros
from .model import Buffer, share


class Adjusted(Protocol):
    """A request's wishes at its next token."""

    @property
    def request(self) -> str: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def bias(self) -> dict[int, float]: ...
    @property
    def has_penalties(self) -> bool: ...


@dataclass
class _Place:
    """A request's row; `counted` tokens of its output are in the history."""

    row: int
    counted: int = 0
    touched: set[int] = field(default_factory=set)


class Adjustments:
    """History and bias of up to `max_rows` requests, in the form of compiler/sampling.py."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        shape = (max_rows, vocab_size)
        self._history, self._bias = lazy_zeros(shape, np.int32), lazy_zeros(shape, np.float32)
        self.history: Buffer = share(self._history)
        """(max_rows, V) int32: twice the occurrences in the output, and one more where the prompt has the token."""
        self.bias: Buffer = share(self._bias)
        """(max_rows, V) float32."""
        self._free = list(range(max_rows))
        self._places: dict[str, _Place] = {}

    @property
    def are_none(self) -> bool:
        """Whether no request has a row."""
        return not self._places

    def places(self, wishes: Sequence[Adjusted]) -> list[int]:
        """The row of each request, brought up to date, or -1 for one that changes nothing; at most `max_rows`.

        Writes to the arrays: no call that reads them may be running.
        """
        for request in self._places.keys() - {wish.request for wish in wishes}:
            self._release(request)
        return [self._place(wish) if wish.has_penalties or wish.bias else -1 for wish in wishes]

    def _place(self, wish: Adjusted) -> int:
        place = self._places.get(wish.request)
        if place is not None and place.counted > len(wish.output):
            self._release(wish.request)  # another request of that name
            place = None
        place = place or self._take(wish)
        if wish.has_penalties:
            new = np.asarray(wish.output[place.counted :], np.int64)
            np.add.at(self._history[place.row], new, 2)
            place.touched.update(new.tolist())
            place.counted = len(wish.output)
        return place.row

    def _take(self, wish: Adjusted) -> _Place:
        place = self._places[wish.request] = _Place(self._free.pop())
        place.touched.update(wish.bias)
        self._bias[place.row, list(wish.bias)] = list(wish.bias.values())
        if wish.has_penalties:
            place.touched.update(wish.prompt)
            self._history[place.row, list(wish.prompt)] = 1
        return place

    def _release(self, request: str) -> None:
        place = self._places.pop(request)
        touched = list(place.touched)
        self._history[place.row, touched] = 0
        self._bias[place.row, touched] = 0
        self._free.append(place.row)
