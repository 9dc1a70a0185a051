"""A step between its launch and the moment when what it gave is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..compiler import xla
from .model import Buffer
from .sampling import Logprobs
from .scheduler import Chunk
from .step_inputs import StepInputs
from .step_results import Failure, StepReport, Token


@dataclass(frozen=True)
class Flight:
    """A step that was launched; `ids` holds a token for each of `sampled`, in order.

    scores:           log-probabilities of prompts that are scored
    creation_seconds: what preparing it took; launched: when it was, by perf_counter
    """

    chunks: list[Chunk]
    sampled: list[Chunk]
    logits: Buffer
    ids: Buffer | None
    logprobs: Logprobs | None
    inputs: StepInputs
    scores: Logprobs | None
    creation_seconds: float
    launched: float

    @property
    def must_be_known(self) -> bool:
        """Whether what it gives decides how the next step samples: penalties count tokens on the host."""
        return any(chunk.sequence.request.sampling.has_penalties for chunk in self.sampled)

    def fetch_ids(self) -> list[int]:
        """Waits for the step: its ids, -1 where the logits gave none."""
        if self.ids is None:
            xla.wait([self.logits.array])
            return []
        return self.ids.to_numpy()[: len(self.sampled)].tolist()

    def report(self, results: Sequence[Token | Failure], seconds: float) -> StepReport:
        """What the step was. results: all that it gave; seconds: of its execution"""
        return StepReport(
            is_prefill=any(chunk.start < len(chunk.sequence.request.prompt) for chunk in self.chunks),
            batch_size=len(self.chunks),
            input_tokens=sum(chunk.count for chunk in self.chunks),
            new_tokens=sum(isinstance(each, Token) for each in results),
            context_tokens=sum(chunk.start + chunk.count for chunk in self.chunks),
            creation_seconds=self.creation_seconds,
            execution_seconds=seconds,
            terminated=sum(isinstance(each, Failure) or each.finish_reason is not None for each in results),
        )
