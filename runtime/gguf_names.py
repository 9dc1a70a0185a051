"""What a GGUF file calls its settings and tensors, in the spelling of the Hugging Face form.

Source: docs/gguf.md of ggml; `convert_hf_to_gguf.py` of llama.cpp, whose LlamaModel interleaves the rows of each query
and key head, since llama.cpp rotates neighbouring dimensions where transformers rotates the two halves. Imports no jax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from .. import ModelError, UnsupportedArchitecture
from .gguf_file import Header
from .safetensors_file import TensorInfo
from .tensor_stream import read_tensor

RopeOrder = Literal["normal", "neox"]
"""Which dimensions of a head are rotated together: neighbours, or the two halves."""

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
"""`general.architecture` -> the name that config.json gives it."""

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_FACTORS = "rope_freqs.weight"

_HINT = "Use a GGUF file that llama.cpp's convert_hf_to_gguf.py made, or the checkpoint in the Hugging Face form."


def config_of(header: Header) -> dict[str, Any]:
    """The settings as config.json would give them; raises ModelError for missing or wrong ones."""
    keys = _Keys(header)
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.count(name, head_dim) != head_dim:
            raise keys.unsupported(name, f"heads of {head_dim} dimensions are used and rotated whole")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[keys.architecture]],
        "vocab_size": keys.count("vocab_size", _rows(header, "token_embd.weight")),
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.count("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }
    if keys.get("expert_count"):
        config["num_local_experts"] = keys.get("expert_count")
    scaling = _rope_scaling(keys, header)
    return config | ({"rope_scaling": scaling} if scaling else {})


def tensors_of(header: Header, order: RopeOrder = "normal") -> dict[str, TensorInfo]:
    """The tensors by their names in the Hugging Face form; those without one keep theirs.

    order: how the file has the rows of queries and keys; llama.cpp's converter writes "normal" ones. Raises ModelError
    """
    keys = _Keys(header)
    heads = keys.count("attention.head_count")
    interleaved = {"attn_q": heads, "attn_k": keys.count("attention.head_count_kv", heads)}
    tensors: dict[str, TensorInfo] = {}
    for name, at in header.tensors.items():
        block = _BLOCK.fullmatch(name)
        if name == _FACTORS:
            continue
        if block is None or block[2] not in _INNER:
            tensors[_OUTER.get(name, name)] = at
            continue
        layer, part, kind = block.groups()
        if order == "normal" and part in interleaved:
            if at.shape[0] % (2 * interleaved[part]):
                raise ModelError(f"{header.file}: the {at.shape[0]} rows of {name} are not {heads} even heads", _HINT)
            at = replace(at, interleaved=interleaved[part])
        tensors[f"model.layers.{layer}.{_INNER[part]}.{kind}"] = at
    return tensors


def _rows(header: Header, tensor: str) -> int | None:
    found = header.tensors.get(tensor)
    return found.shape[0] if found else None


def _rope_scaling(keys: _Keys, header: Header) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none" and keys.get("rope.scale_linear") is not None:  # before there was a type
        return {"rope_type": "linear", "factor": keys.number("rope.scale_linear")}
    if _FACTORS in header.tensors:
        if kind != "none":
            raise keys.unsupported("rope.scaling.type", f"{_FACTORS} scales the rotations already")
        return {"rope_type": "factors", "factors": _factors(header)}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise keys.unsupported("rope.scaling.type", "none, linear and yarn are known")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
        if keys.number("rope.scaling.attn_factor", 1.0) != 1:
            raise keys.unsupported("rope.scaling.attn_factor", "only 1 is known")
    return scaling


def _factors(header: Header) -> list[float]:
    """What the frequency of each pair of dimensions is divided by."""
    at = header.tensors[_FACTORS]
    if len(at.shape) != 1 or at.dtype != "F32":
        raise ModelError(f"{header.file}: {_FACTORS} is no row of float32", _HINT)
    values = np.empty(at.shape, np.float32)
    read_tensor(at, values)
    return values.tolist()


class _Keys:
    """The metadata below the architecture's name."""

    def __init__(self, header: Header) -> None:
        self._file = header.file
        self._metadata: Mapping[str, Any] = header.metadata
        name = header.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ModelError(f"{header.file} names no architecture: general.architecture is {name!r}", _HINT)
        if name not in ARCHITECTURES:
            raise UnsupportedArchitecture(
                f"the architecture {name!r} of {header.file} is not supported",
                f"GGUF files of {', '.join(ARCHITECTURES)} are read; `max list` shows the architectures there are.",
            )
        self.architecture = name
        parts = header.metadata.get("split.count", 1)
        if parts != 1:
            raise ModelError(f"{header.file} is one of {parts} parts", "Join them with llama-gguf-split --merge first.")

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a positive number")
        # A float32 stands for the decimal it was rounded from: 1e-5, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return value

    def unsupported(self, key: str, why: str) -> ModelError:
        return ModelError(f"{self._file}: {self.architecture}.{key} is {self.get(key)!r}; {why}", _HINT)

    def _wrong(self, key: str, value: Any, needed: str) -> ModelError:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        found = "missing" if value is None else shown
        return ModelError(f"{self._file}: {self.architecture}.{key} is {found}, and has to be {needed}", _HINT)
