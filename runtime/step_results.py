"""What steps of the engine give: tokens and failures for requests, reports and counts for whoever watches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .. import MaxError
from .request import FinishReason
from .sampling import TokenLogprobs


@dataclass(frozen=True)
class Token:
    """One new token of a request; `finish_reason` is set on the last.

    cached_tokens: of the prompt, taken from the prefix cache; told with the first token
    prompt_logprobs: of the prompt's tokens behind the first, where asked for; told with the first token
    """

    request_id: str
    id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Failure:
    """The end of a request that went wrong."""

    request_id: str
    error: MaxError


class EngineLost(MaxError):
    """The pages went with a step that failed: every request has ended, in `failures`, and no other can be taken."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("the engine lost its pages in a step that failed", "Start it anew.")
        self.failures = failures


@dataclass(frozen=True)
class StepReport:
    """What one step was; seconds on the clock. A step that computes any token of a prompt counts as prefill.

    new_tokens:     of answers, which a step that computes prompts gives as well
    context_tokens: tokens in the pages of the requests in the step, this step's among them
    """

    is_prefill: bool
    batch_size: int
    input_tokens: int
    new_tokens: int
    context_tokens: int
    creation_seconds: float
    execution_seconds: float
    terminated: int


@dataclass
class EngineStats:
    """Counts since the start; `ended` by how requests ended: finished, aborted, rejected, failed."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    last_step: StepReport | None = None

    def count(self, report: StepReport) -> None:
        """Adds a step."""
        self.steps += 1
        self.last_step = report
        seconds = report.creation_seconds + report.execution_seconds
        if report.is_prefill:
            self.prefill_tokens += report.input_tokens
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += report.input_tokens
            self.decode_seconds += seconds

    def take_last_step(self) -> StepReport | None:
        """The report of the last step, once."""
        report, self.last_step = self.last_step, None
        return report
