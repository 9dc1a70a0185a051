"""A request and its progress. Holds no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    max_new_tokens: at most so many; the context's end is a limit too
    min_new_tokens: stop tokens cannot come before so many others
    stop_tokens:    ids that end the output; ignored with ignore_eos
    """

    id: str
    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(eq=False)
class Generation:
    """A request in work. Keys and values of the first `computed` of `tokens` lie in `pages`."""

    request: Request
    tokens: list[int]
    row: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet: the prompt's rest, or the token sampled last."""
        return len(self.tokens) - self.computed

    def finish_reason(self, max_length: int) -> FinishReason | None:
        """Why nothing more comes after the token sampled last, if so."""
        request = self.request
        made = len(self.tokens) - len(request.prompt)
        if self.tokens[-1] in request.stop_tokens and not request.ignore_eos and made > request.min_new_tokens:
            return "stop"
        at_limit = request.max_new_tokens is not None and made >= request.max_new_tokens
        return "length" if at_limit or len(self.tokens) >= max_length else None
