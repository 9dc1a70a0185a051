"""Which model is run, how many requests are computed at once, on how much memory, and how tokens are drawn."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ..cache.fields import Section, setting

Encoding = Literal["float32", "bfloat16", "q8_0", "q4_k", "q4_0", "q6_k", "float8_e4m3fn", "float4_e2m1fnx2", "gptq"]


RopeType = Literal["none", "normal", "neox", "longrope", "yarn"]


SUPPORTED_ENCODINGS = ("float32", "bfloat16", "q8_0", "q6_k", "q4_k", "q4_0")


class ModelConfig(Section):
    """The checkpoint and how it is read."""

    model_path: Path | None = setting(None, compiles=False, flag="--model")
    """A GGUF file, or the folder of a checkpoint in the Hugging Face form; the built-in model without it."""

    weight_path: Path | None = setting(None, compiles=False)
    """A GGUF or safetensors file whose weights are used instead of those in the folder, which gives the settings and
    the tokenizer where it holds them; from the current folder, or from that of the model."""

    rope_type: RopeType | None = setting(None, compiles=False)
    """How a GGUF file has the queries and keys: normal, the two halves of each head interleaved, as llama.cpp's
    converter writes Llama; or neox, as they are in the Hugging Face form [default: normal]."""

    quantization_encoding: Encoding | None = setting(None, compiles=True)
    """Encoding of the matrices: float32, bfloat16, q8_0, q6_k, q4_k or q4_0; weights in another one are converted when
    they are prepared [default: that of each matrix in the checkpoint, and float32 for float16]."""

    max_length: int | None = setting(None, compiles=True, ge=2)
    """Tokens of prompt and answer together [default: what the model was trained for]."""

    @model_validator(mode="after")
    def _is_supported(self) -> "ModelConfig":
        if self.quantization_encoding not in (None, *SUPPORTED_ENCODINGS):
            raise ValueError(
                f"--quantization-encoding {self.quantization_encoding} is not supported on cpu yet; "
                f"there are {', '.join(SUPPORTED_ENCODINGS)}"
            )
        if self.rope_type not in (None, "normal", "neox"):
            raise ValueError(
                f"--rope-type {self.rope_type} is not supported: it says how rows lie, normal or neox; "
                "what is rotated, and how it is scaled, is read from the checkpoint"
            )
        return self

    @property
    def rope_order(self) -> Literal["normal", "neox"] | None:
        """How a GGUF file has the rows of queries and keys, if that was said."""
        return self.rope_type if self.rope_type in ("normal", "neox") else None


class BatchConfig(Section):
    """The sizes of a step and of the page pool; equal for generate, serve and warm-cache, so that keys are equal."""

    max_batch_size: int = setting(16, compiles=True, ge=1, le=1024)
    """Requests computed at once, at most."""

    max_batch_input_tokens: int = setting(512, compiles=True, ge=1, le=65536)
    """Tokens computed in one step, at most: longer prompts are computed in chunks. Rounded up to a power of two."""

    max_batch_total_tokens: int | None = setting(None, compiles=True, ge=1)
    """Tokens that the pages hold for all requests together [default: on cpu what 256 MB hold, and at least
    --max-length; on devices as many as there is memory for]."""

    device_memory_utilization: float | None = setting(None, compiles=False, gt=0, le=1)
    """Share of a device's memory to take; pages fill what weights leave of it. On cpu, of this host's memory [default:
    0.9 on devices; on cpu pages have a size of their own]."""

    kv_cache_format: Literal["float32", "bfloat16", "float8_e4m3fn"] | None = setting(None, compiles=True)
    """Format of keys and values in the pages, float32 or bfloat16 [default: float32 beside float32 weights on cpu, and
    where there are no kernels; else bfloat16]."""

    kv_cache_page_size: int = setting(128, compiles=True, ge=1, le=4096)
    """Tokens of one page of keys and values."""

    @model_validator(mode="after")
    def _has_format(self) -> "BatchConfig":
        if self.kv_cache_format == "float8_e4m3fn":
            raise ValueError("--kv-cache-format float8_e4m3fn is not supported on cpu yet; there are float32, bfloat16")
        return self


class SamplingConfig(Section):
    """How tokens are drawn and where an answer ends. What is not given is the checkpoint's own default."""

    temperature: float | None = setting(None, compiles=False)
    """Randomness: 0 takes the most likely token [default: the checkpoint's, else 1]."""

    top_k: int | None = setting(None, compiles=False)
    """Draw from the k most likely tokens; 1 is greedy, 0 or -1 draws from all [default: the checkpoint's, else 255]."""

    top_p: float | None = setting(None, compiles=False)
    """Draw from the fewest tokens that have this probability together [default: the checkpoint's, else 1]."""

    min_p: float | None = setting(None, compiles=False)
    """Draw from tokens with at least this share of the likeliest one's probability
    [default: the checkpoint's, else 0]."""

    repetition_penalty: float | None = setting(None, compiles=False)
    """Divide the logits of tokens seen in prompt or answer [default: the checkpoint's, else 1]."""

    frequency_penalty: float = setting(0.0, compiles=False)
    """Subtract this from a token's logit for each time it stands in the answer."""

    presence_penalty: float = setting(0.0, compiles=False)
    """Subtract this once from the logit of every token that stands in the answer."""

    seed: int | None = setting(None, compiles=False)
    """Seed of the draws: equal seeds give equal answers [default: a fresh one, shown in the statistics]."""

    max_new_tokens: int | None = setting(None, compiles=False)
    """Tokens of the answer, at most; -1 for as many as fit [default: the checkpoint's, else as many as fit]."""

    min_new_tokens: int = setting(0, compiles=False)
    """Tokens of the answer, at least: it cannot stop before."""

    stop: tuple[str, ...] = setting((), compiles=False)
    """Text that ends the answer and is not shown; may be given several times."""

    stop_token_ids: tuple[int, ...] = setting((), compiles=False)
    """Token ids that end the answer and are not shown, separated by commas."""

    ignore_eos: bool = setting(False, compiles=False)
    """Go on when the model ends its answer, until --max-new-tokens or a --stop."""


class FeaturesConfig(Section):
    """What may be asked for. All of it always works; a server may still refuse it."""

    enable_penalties: bool = setting(True, compiles=False)
    """Take penalties; without, they are refused, and a checkpoint's own one is left out."""

    enable_min_tokens: bool = setting(True, compiles=False)
    """Take a least number of tokens for an answer; without, it is refused."""


class SchedulingConfig(Section):
    """How requests share the engine. Nothing here changes compiled code."""

    enable_prefix_caching: bool = setting(True, compiles=False)
    """Keep the pages of prompts and answers while there is room, and share them with requests that begin alike."""

    enable_chunked_prefill: bool = setting(True, compiles=False)
    """Compute a long prompt in several steps; without, one longer than --max-batch-input-tokens is refused."""

    enable_in_flight_batching: bool = setting(True, compiles=False)
    """Compute prompts in the same steps as the next tokens of answers; without, steps of either kind take turns."""

    enable_overlap_scheduler: bool | None = setting(None, compiles=False)
    """Prepare a step while the one before is computed; a new request waits a step more [default: where a step takes
    less than 4 ms]."""

    enable_prioritize_first_decode: bool = setting(False, compiles=False)
    """After a step that completes prompts, compute the second tokens of these answers alone: they come sooner, and
    everything else waits a step longer."""

    max_queue_size_tg: int | None = setting(None, compiles=False, ge=1)
    """Requests in work at once, at most; the others wait [default: --max-batch-size]."""

    min_batch_size_tg: int | None = setting(None, compiles=False, ge=0)
    """Compute no prompts while at least so many answers are generated; below, prompts come first [default: prompts
    are never held back for that]."""

    kvcache_ce_watermark: float = setting(1.0, compiles=False, ge=0, le=1)
    """Share of the pages that may be in use once a new request has its own; above, it waits until others end."""

    chunked_prefill_min_chunk_size: int = setting(0, compiles=False, ge=0)
    """Tokens that a prompt is not cut below, on either side of the cut; at most half of --max-batch-input-tokens."""

    max_request_input_tokens: int = setting(0, compiles=False, ge=0)
    """Tokens of one prompt that a step computes, at most, so that short prompts fit beside a long one; 0 for as many
    as there is room for."""

    prefill_schedule_interval: int = setting(1, compiles=False, ge=1)
    """Compute prompts in every Nth step only; the steps between are left to answers. A step without answers
    computes prompts in any case."""

    prefill_coalesce_min_pending: int = setting(0, compiles=False, ge=0)
    """Beside answers, hold new prompts back until there are so many of them, so that they share a step."""

    prefill_coalesce_max_held_steps: int = setting(0, compiles=False, ge=0)
    """Steps after which they are computed in any case; 0 for as many as --prefill-coalesce-min-pending."""

    ce_delay_ms: float = setting(0.0, compiles=False, ge=0, le=60_000)
    """Milliseconds that new prompts wait for others to share their step. Answers go on meanwhile."""


class QueueConfig(Section):
    """How many requests may wait."""

    max_queue_size: int | None = setting(None, compiles=False, ge=0)
    """Requests that may wait before the scheduler's own queue; one more is refused with 429 [default: any number]."""

    max_pending_requests: int | None = setting(None, compiles=False, ge=1)
    """Requests that the scheduler's own queue takes, at most; the others wait before it, where --max-queue-size
    bounds them [default: any number, or none where --max-queue-size is given]."""

    @property
    def max_waiting(self) -> int | None:
        """Requests that may wait in all, None for any number."""
        return None if self.max_queue_size is None else self.max_queue_size + (self.max_pending_requests or 0)
