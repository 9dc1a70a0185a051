"""How likely a model holds the tokens of a prompt: logits of its rows, beside those that are sampled from."""

from __future__ import annotations

import math

import numpy as np

from .model import Buffer, share
from .sampling import Logprobs, Sampler, TokenLogprobs
from .scheduler import Chunk
from .step_inputs import StepInputs


def score(sampler: Sampler, logits: Buffer, inputs: StepInputs, max_batch: int) -> Logprobs | None:
    """The log-probabilities, on the device, of the tokens that follow on the scored rows; None where there are none."""
    if not inputs.scored:
        return None
    ids = np.zeros(max_batch, np.int32)
    for row, (chunk, position) in enumerate(inputs.scored, len(inputs.sampled)):
        ids[row] = chunk.sequence.request.prompt[position + 1]
    return sampler.logprobs(logits, share(ids))


def keep(scores: Logprobs, inputs: StepInputs) -> list[Chunk]:
    """Waits for the scores and adds them to their sequences; returns the chunks of which one is not a number."""
    chosen, top_ids, top = (part.to_numpy().tolist() for part in scores)
    broken: list[Chunk] = []
    for row, (chunk, position) in enumerate(inputs.scored, len(inputs.sampled)):
        sequence = chunk.sequence
        if math.isnan(chosen[row]):
            broken += [] if chunk in broken else [chunk]
        elif position == len(sequence.scores):  # else known already, as it gave way while this was computed
            count = sequence.request.top_logprobs or 0
            sequence.scores.append(TokenLogprobs(chosen[row], top_ids[row][:count], top[row][:count]))
    return broken
