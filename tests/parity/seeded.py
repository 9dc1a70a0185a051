"""Checkpoints made from nothing but their config: the same bits wherever and whenever they are made.

Numpy's own generators may change between versions; integer hashes and one IEEE multiplication may not. Both sides of
a parity test make the same weights here, so that no checkpoint is stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Shape = tuple[int, ...]

_LOGITS_STD = 3.0
_QUERY_KEY_GAIN = 1.6
_BLOCK_GAIN = 1.4
_EMBED_STD = 0.4


def seeded_words(name: str, count: int) -> np.ndarray:
    """The first `count` outputs, (count,) uint64, of SplitMix64 started from the sha256 of `name`.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16.
    """
    start = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8").astype(np.uint64)
    z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def seeded_tensor(name: str, shape: Shape, scale: float) -> np.ndarray:
    """Nearly normal numbers of mean 0 and standard deviation `scale`, float32: each the sum of four uniform ones."""
    words = seeded_words(name, math.prod(shape))
    lanes = sum((words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    # Four uniform integers below 2^16 have mean 2 (2^16 - 1) and variance 4 (2^32 - 1) / 12.
    centred = np.asarray(lanes).astype(np.float64) - 2.0 * 0xFFFF
    return (centred * (scale / math.sqrt((2.0**32 - 1) / 3))).astype(np.float32).reshape(shape)


def seeded_tokens(name: str, count: int, vocab_size: int) -> np.ndarray:
    """(count,) int64 token ids below `vocab_size`."""
    return (seeded_words(name, count) % np.uint64(vocab_size)).astype(np.int64)


def seeded_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """Writes config.json and model.safetensors (float32) of a LlamaForCausalLM into `folder`, which must exist.

    Norm weights are near 1. Matrices are scaled so that logits have a standard deviation of a few units and attention
    looks at a few keys rather than at all alike: greedy decoding then neither ties nor falls into a short cycle.
    """
    tensors = {}
    for name, shape in _tensor_shapes(config):
        mean, scale = (1.0, 0.1) if len(shape) == 1 and name.endswith("norm.weight") else (0.0, _scale(name, config))
        tensors[name] = np.float32(mean) + seeded_tensor(name, shape, scale)
    full = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **config}
    (folder / "config.json").write_text(json.dumps(full, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    projections = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (f, d), "up": (f, d), "down": (d, f)}
    yield "model.embed_tokens.weight", (v, d)
    for layer in range(config["num_hidden_layers"]):
        yield f"model.layers.{layer}.input_layernorm.weight", (d,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (d,)
        for part, shape in projections.items():
            module, flag = ("self_attn", "attention_bias") if part in "qkvo" else ("mlp", "mlp_bias")
            yield f"model.layers.{layer}.{module}.{part}_proj.weight", shape
            if config.get(flag):
                yield f"model.layers.{layer}.{module}.{part}_proj.bias", shape[:1]
    yield "model.norm.weight", (d,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (v, d)


def _scale(name: str, config: dict[str, Any]) -> float:
    """The standard deviation of a tensor that is not a norm: its gain over the root of the inputs that it sums."""
    d = config["hidden_size"]
    if name.endswith(".bias"):
        return 0.3
    if "embed_tokens" in name:
        return _LOGITS_STD / math.sqrt(d) if config.get("tie_word_embeddings") else _EMBED_STD
    if "lm_head" in name:
        return _LOGITS_STD / math.sqrt(d)
    if "q_proj" in name or "k_proj" in name:
        return _QUERY_KEY_GAIN / math.sqrt(d)
    if "o_proj" in name:
        head_dim = config.get("head_dim") or d // config["num_attention_heads"]
        return _BLOCK_GAIN / math.sqrt(config["num_attention_heads"] * head_dim)
    if "down_proj" in name:
        return _BLOCK_GAIN / math.sqrt(config["intermediate_size"])
    return _BLOCK_GAIN / math.sqrt(d)
