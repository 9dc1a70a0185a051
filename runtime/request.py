"""A request and its progress. Holds no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .prefix_cache import Chain
from .sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    max_new_tokens: at most so many; the context's end is a limit too
    min_new_tokens: stop tokens cannot come before so many others
    stop_tokens:    ids that end the output; ignored with ignore_eos
    top_logprobs:   likeliest tokens whose log-probabilities are told beside the token's own; None for not even that
    cache_salt:     beginnings are shared with requests of the same salt only
    prompt_logprobs: tell the log-probabilities of the prompt's tokens behind the first, and `top_logprobs` others, too
    """

    id: str
    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    cache_salt: str = ""
    prompt_logprobs: bool = False


@dataclass(eq=False)
class Generation:
    """A request in work. Keys and values of the first `computed` of its tokens lie in `pages`, or will when the steps
    that were begun have ended.

    in_flight:     how many tokens after `tokens` are being computed: they count, and are not known yet
    cached_tokens: of the prompt, found in the prefix cache when it was first taken up
    chain:         the pages known to the prefix cache, while running
    scores:        of the prompt's tokens behind the first, as far as they are known and were asked for
    """

    request: Request
    tokens: list[int]
    row: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    cached_tokens: int | None = None
    chain: Chain | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def is_new(self) -> bool:
        """Whether nothing of the answer has been sampled or is being."""
        return self.length == len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens that there are, the one in flight among them."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet: the prompt's rest, or the token sampled last."""
        return self.length - self.computed

    @property
    def is_scoring(self) -> bool:
        """Whether tokens of the prompt are still to be computed whose logits are wanted."""
        return self.request.prompt_logprobs and max(self.computed, len(self.scores)) < len(self.request.prompt) - 1

    def scored(self, start: int, count: int) -> range:
        """The positions in this part of the prompt whose logits are wanted: they tell of the token behind each."""
        if not self.request.prompt_logprobs:
            return range(0)
        return range(max(start, len(self.scores)), min(start + count, len(self.request.prompt) - 1))

    def may_go_on(self, max_length: int) -> bool:
        """Whether a token can follow those that there are, whatever the ones in flight turn out to be."""
        return not self._is_full(self.length, max_length)

    def _is_full(self, length: int, max_length: int) -> bool:
        wanted = self.request.max_new_tokens
        return length >= max_length or (wanted is not None and length - len(self.request.prompt) >= wanted)

    def finish_reason(self, max_length: int) -> FinishReason | None:
        """Why nothing more comes after the token sampled last, if so."""
        request = self.request
        made = len(self.tokens) - len(request.prompt)
        if self.tokens[-1] in request.stop_tokens and not request.ignore_eos and made > request.min_new_tokens:
            return "stop"
        return "length" if self._is_full(len(self.tokens), max_length) else None
