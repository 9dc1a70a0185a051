"""What the API process and the engine worker say to each other: msgspec structs, tagged, packed as MessagePack.

A frame between them is a list of such messages: what a step of the engine gives one client travels as one.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .. import Kind

MAX_TOP_LOGPROBS = 20
"""The most alternatives per token that a request may ask for, as in the OpenAI API."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, omit_defaults=True):
    """One message; the name of its class is its tag."""


# From the API to the worker


class Sampling(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """As `runtime.sampling.SamplingParams`, field by field."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    bias: dict[int, float] = {}


class Submit(Message, frozen=True):
    """Generate a continuation of `prompt_ids`.

    stop_token_ids: ids that end the answer, the model's own among them; none of them with ignore_eos
    top_logprobs:   alternatives per token to report, 0 for the token's own only; None for no log-probabilities
    cache_salt:     prompts share pages only with prompts of the same salt
    """

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    top_logprobs: int | None = None
    cache_salt: str = ""
    prompt_logprobs: bool = False
    """Report the log-probabilities of the prompt's tokens behind the first as well."""


class Abort(Message, frozen=True):
    """Stop working on a request; it is answered with Ended("aborted") unless it has ended already."""

    id: str


class ResetPrefixCache(Message, frozen=True):
    """Forget the pages that no request uses; answered with PrefixCacheReset."""


class Hello(Message, frozen=True):
    """A client has come: answered with what the worker does now, Loading or Ready, and told what follows."""


# From the worker to the API


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities of the logits before temperature: of the token, and of the likeliest ones."""

    token: float
    top_ids: list[int]
    top: list[float]


class Tokens(Message, frozen=True):
    """New tokens of one request, in order.

    `finish_reason` is set with the last, `cached_tokens` with the first; so is `prompt_logprobs`, where asked for:
    of the prompt's tokens behind the first.
    """

    id: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Logprobs] | None = None


class Ended(Message, frozen=True):
    """A request ended without (further) tokens. kind and message, hint are those of a MaxError for the last two."""

    id: str
    how: Literal["aborted", "rejected", "failed"]
    kind: Kind = "internal"
    message: str = ""
    hint: str = ""


class PrefixCacheReset(Message, frozen=True):
    """How many pages were forgotten."""

    pages: int


class Ready(Message, frozen=True):
    """The worker answers requests from now on.

    seconds: what each part of the start took (labels of maxserve.model_load_time): spawn, until the worker's first
             line ran; build, finding or preparing artifact and weights; compile, of which none on a warm start; init,
             loading code and weights; total
    artifact_source: "cache" or "compiled", with the reason; artifact: the MEF's path
    cache: what the worker did with the store until then, as cache.counters.Counters.to_json gives it
    """

    max_length: int
    vocab_size: int
    max_batch_size: int
    page_tokens: int
    num_pages: int
    encoding: str
    device: str
    artifact: str
    artifact_source: str
    seconds: dict[str, float] = {}
    cache: dict[str, Any] = {}


class StartFailed(Message, frozen=True):
    """The worker cannot start; it exits after this. The fields are those of a MaxError."""

    kind: Kind
    message: str
    hint: str


class Loading(Message, frozen=True):
    """What the worker does before Ready, for a person to read, and how far it is (0 to 1, or None)."""

    what: str
    fraction: float | None = None


class StepStats(Message, frozen=True):
    """One step of the engine, sent with its tokens, for metrics. Counters (`total_...`) grow since the start."""

    batch_type: Literal["CE", "TG"]
    batch_size: int
    input_tokens: int
    new_tokens: int
    context_tokens: int
    queued: int
    running: int
    execution_s: float
    creation_s: float
    terminated: int
    used_pages: int
    num_pages: int
    total_preempted: int
    total_cache_hit_tokens: int
    total_cache_miss_tokens: int
    total_cache_hit_pages: int


class StoreStats(Message, frozen=True):
    """What the worker has done with the store since its start, as `Ready.cache` is given, and how many executables it
    has loaded. Said to whoever comes, and whenever it has changed, with steps and between them."""

    cache: dict[str, Any]
    executables: int


ToWorker = Hello | Submit | Abort | ResetPrefixCache
FromWorker = Tokens | Ended | PrefixCacheReset | Ready | StartFailed | Loading | StepStats | StoreStats
