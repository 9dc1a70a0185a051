"""What a scheduler may do, and in which steps it may compute prompts. Holds no tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .config import SchedulingConfig


@dataclass(frozen=True)
class Policy:
    """What a scheduler may do; where a field is left out, prompts are computed as soon as there is room.

    chunked_prefill:    a prompt may be computed in several steps; otherwise it waits for a step that holds all of it
    in_flight_batching: prompts are computed beside decoding; otherwise steps of either kind take turns
    first_decode_alone: a step that completes prompts is followed by one for the second tokens of their answers alone
    prefix_caching:     beginnings that were computed before are shared
    max_running:        requests in work at once, None for as many as there are rows
    pages_watermark:    share of the pages that may be in use once a new request has its own, unless it is alone
    least_chunk:        tokens that a prompt is not cut below, on either side of the cut
    most_chunk:         tokens of one prompt in a step, 0 for any number
    decode_floor:       while at least so many decode, no prompt is computed; None for never holding one back for that
    prompt_interval:    beside decoding, prompts are computed in every Nth step
    coalesced:          beside decoding, new prompts wait until there are so many of them
    coalesced_steps:    or until so many steps have gone by; 0 for as many as `coalesced`
    delay_s:            seconds that new prompts wait for others to share their step
    """

    chunked_prefill: bool = True
    in_flight_batching: bool = True
    first_decode_alone: bool = False
    prefix_caching: bool = True
    max_running: int | None = None
    pages_watermark: float = 1.0
    least_chunk: int = 0
    most_chunk: int = 0
    decode_floor: int | None = None
    prompt_interval: int = 1
    coalesced: int = 0
    coalesced_steps: int = 0
    delay_s: float = 0.0

    @staticmethod
    def of(config: SchedulingConfig) -> Policy:
        """What the settings ask for."""
        return Policy(
            chunked_prefill=config.enable_chunked_prefill,
            in_flight_batching=config.enable_in_flight_batching,
            first_decode_alone=config.enable_prioritize_first_decode,
            prefix_caching=config.enable_prefix_caching,
            max_running=config.max_queue_size_tg,
            pages_watermark=config.kvcache_ce_watermark,
            least_chunk=config.chunked_prefill_min_chunk_size,
            most_chunk=config.max_request_input_tokens,
            decode_floor=config.min_batch_size_tg,
            prompt_interval=config.prefill_schedule_interval,
            coalesced=config.prefill_coalesce_min_pending,
            coalesced_steps=config.prefill_coalesce_max_held_steps,
            delay_s=config.ce_delay_ms / 1e3,
        )


@dataclass(frozen=True)
class Prompts:
    """Which prompts a step may compute: those that were begun, and new ones."""

    begun: bool = True
    new: bool = True


class PrefillGate:
    """Holds prompts back for as long as a policy asks. A step without decoding computes them, but for the delay."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds"""
        self._policy, self._clock = policy, clock
        self._steps = self._held_steps = 0
        self._waiting_since: float | None = None

    def next_step(self, decoding: int, waiting: int) -> Prompts:
        """What a step may compute beside so many sequences that decode, while so many new prompts wait."""
        policy = self._policy
        self._steps += 1
        if not waiting:
            self._held_steps, self._waiting_since = 0, None
        elif self._waiting_since is None:
            self._waiting_since = self._clock()
        has_turn = not decoding or self._steps % policy.prompt_interval == 0
        is_over_floor = policy.decode_floor is not None and decoding >= max(policy.decode_floor, 1)
        begun = has_turn and not is_over_floor
        new = begun and not self.delay_left_s() and not (decoding and self._coalesces(waiting))
        if new:
            self._held_steps, self._waiting_since = 0, None
        elif waiting and decoding:
            self._held_steps += 1
        return Prompts(begun, new)

    def _coalesces(self, waiting: int) -> bool:
        policy = self._policy
        return waiting < policy.coalesced and self._held_steps < (policy.coalesced_steps or policy.coalesced)

    def delay_left_s(self) -> float:
        """Seconds that the new prompts still wait for others."""
        if self._waiting_since is None:
            return 0.0
        return max(0.0, self._waiting_since + self._policy.delay_s - self._clock())
