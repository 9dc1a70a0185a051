"""From token ids to the text of an answer: detokenized, cut at its stop, and with the reason why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .. import RequestError
from .detokenize import TextStream
from .stop import StopMatcher

FinishReason = Literal["stop", "length"]
MAX_STOPS = 16
MAX_STOP_CHARS = 1024


@dataclass(frozen=True)
class StopRules:
    """When an answer ends. Raises RequestError for values that no answer could follow."""

    max_new_tokens: int
    min_new_tokens: int = 0
    """Stops of text and of tokens count only behind this many tokens."""
    stop: Sequence[str] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens named by the request; they end an answer even where `ignore_eos` is set."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens with which the model ends its turn."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}", "Ask for at least one token.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens is {self.min_new_tokens}, beside max_new_tokens {self.max_new_tokens}",
                "It lies between 0 and max_new_tokens.",
            )
        if negative := sorted(token_id for token_id in self.stop_token_ids if token_id < 0):
            raise RequestError(f"stop_token_ids holds {negative[0]}", "Token ids are not negative.")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop holds {len(self.stop)} strings", f"Give at most {MAX_STOPS}.")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in self.stop):
            raise RequestError(
                f"stop holds a string that is empty or longer than {MAX_STOP_CHARS:,} characters",
                "Leave an empty one out, as it would end every answer at once; shorten a long one.",
            )

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer without being shown."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True)
class TextDelta:
    """Text to show now, and with the last piece why the answer ended."""

    text: str
    finish_reason: FinishReason | None = None


class CompletionText:
    """The text of one answer, token by token. The joined deltas do not depend on when they were asked for."""

    def __init__(self, stream: TextStream, rules: StopRules) -> None:
        self._stream = stream
        self._rules = rules
        self._ending_token_ids = rules.ending_token_ids
        self._matcher = StopMatcher(rules.stop)
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens the answer took, the one that ended it included."""
        return self._num_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it goes on."""
        return self._finish_reason

    def push(self, token_id: int) -> TextDelta:
        """Takes the next token. Tokens behind the end, which a scheduler may have computed ahead, change nothing."""
        if self._finish_reason is not None:
            return TextDelta("", self._finish_reason)
        self._num_tokens += 1
        may_stop = self._num_tokens > self._rules.min_new_tokens
        if may_stop and token_id in self._ending_token_ids:
            return self.finish("stop")
        text, stopped = self._stream.push(token_id), False
        if may_stop:
            text, stopped = self._matcher.push(text)
        if stopped:
            self._finish_reason = "stop"
        elif self._num_tokens == self._rules.max_new_tokens:
            last = self.finish("length")
            return TextDelta(text + last.text, last.finish_reason)
        return TextDelta(text, self._finish_reason)

    def finish(self, reason: FinishReason) -> TextDelta:
        """Ends the answer from outside, such as at the end of the context: returns the text that was held back.

        A stop string that turns up in that text makes the reason "stop".
        """
        if self._finish_reason is not None:
            return TextDelta("", self._finish_reason)
        text, stopped = self._matcher.push(self._stream.flush())
        if not stopped:
            rest, stopped = self._matcher.flush()
            text += rest
        self._finish_reason = "stop" if stopped else reason
        return TextDelta(text, self._finish_reason)
