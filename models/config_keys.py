"""Reading config.json: keys that must be there, and keys that an architecture would get wrong. Imports no jax."""

from __future__ import annotations

import math
from typing import Any

from .. import ModelError

# Keys that change the computation in ways that the plain decoder here does not follow, with the values that do not.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (None, False),
    "kv_lora_rank": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "position_embedding_type": (None, "rope", "absolute"),
    "pretraining_tp": (None, 0, 1),
    "qk_norm": (None, False),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "sliding_window": (None,),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


def refuse_unsupported(raw: dict[str, Any], architecture: str) -> None:
    """Raises ModelError naming every key whose value asks for a computation that `architecture` does not do."""
    wrong = [
        f"{key}={raw[key]!r}" for key, harmless in _HARMLESS_VALUES.items() if key in raw and raw[key] not in harmless
    ]
    if wrong:
        raise ModelError(
            f"config.json asks for what the {architecture} architecture does not compute: {', '.join(wrong)}",
            "Use a checkpoint without these keys; `max list` shows the architectures there are.",
        )


def require(raw: dict[str, Any], key: str, most: int | None = None) -> int:
    """The positive integer under `key`, of at most `most`; raises ModelError when it is not there or not one."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        found = "is missing" if key not in raw else f"is {value!r}"
        raise ModelError(f"config.json: {key} {found}", "A positive integer is needed there; is the download complete?")
    if most is not None and value > most:
        raise ModelError(f"config.json: {key} is {value}", f"At most {most} is supported; is the file damaged?")
    return value


def optional(raw: dict[str, Any], key: str, default: int) -> int:
    """As `require`, but `default` where the key is missing or null."""
    return default if raw.get(key) is None else require(raw, key)


def boolean(raw: dict[str, Any], key: str) -> bool:
    """The truth under `key`, False where the key is missing or null; else raises ModelError: any text would be true."""
    value = raw.get(key)
    if value not in (None, True, False):
        raise ModelError(f"config.json: {key} is {value!r}", "true or false is needed there.")
    return bool(value)


def number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """The positive number under `key`, or `default` where the key is missing or null; else raises ModelError."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        found = "is missing" if key not in raw else f"is {value!r}"
        raise ModelError(f"config.json: {key} {found}", "A positive number is needed there; is the download complete?")
    return float(value)
