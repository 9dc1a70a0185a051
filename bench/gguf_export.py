"""Writes a Llama checkpoint as a GGUF file: `python -m max.bench.gguf_export DIR FILE [--type q8_0]`.

Other engines read the same weights then. Matrices get the type that was asked for, vectors stay float32. The tokenizer
has to be a byte-level BPE that splits text as GPT-2 does, as those of `random_model` and the built-in model are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from ..compiler import native
from ..compiler.native_packing import QuantizedEncoding
from ..models.llama_config import Config
from ..models.rope import inverse_frequencies
from ..runtime.checkpoint import Checkpoint
from ..runtime.safetensors_file import TensorInfo

TYPES = {
    "f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16,
    "q8_0": Type.Q8_0, "q6_k": Type.Q6_K, "q4_k": Type.Q4_K, "q4_0": Type.Q4_0,
}  # fmt: skip
_FILE_TYPES = {  # llama.cpp's llama_ftype
    Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q8_0: 7, Type.Q4_K: 14, Type.Q6_K: 18, Type.BF16: 32,
}  # fmt: skip
_OURS: dict[Type, QuantizedEncoding] = {Type.Q6_K: "q6_k", Type.Q4_K: "q4_k"}
"""What the package reads and does not quantize."""


def write_gguf(folder: Path, file: Path, type_name: str = "f32") -> None:
    """Converts the checkpoint in `folder`; memory stays below a few copies of its largest tensor.

    Matrices whose rows are no whole blocks of q6_k or q4_k become q8_0. Raises what `Checkpoint.open`
    raises, KeyError for an unknown type, and ValueError where rows are no whole blocks.
    """
    checkpoint, quantization = Checkpoint.open(folder), TYPES[type_name]
    config = Config.from_hf(checkpoint.config)
    writer = gguf.GGUFWriter(file, "llama")
    _add_config(writer, config)
    writer.add_file_type(_FILE_TYPES[quantization])
    _add_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    tensors = [(name, at) for name, at in checkpoint.tensors.items() if not (config.tied and name == "lm_head.weight")]
    stored = {name: _type_of(at, quantization) for name, at in tensors}
    for name, at in tensors:
        shape = gguf.quant_shape_to_byte_shape(at.shape, stored[name])
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if to is None:
            raise ValueError(f"{name} has no name in GGUF")
        writer.add_tensor_info(to, shape, np.dtype(np.uint8), int(np.prod(shape)), stored[name])
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, at in tensors:
        writer.write_tensor_data(_quantized(_read(checkpoint, name, at, config), stored[name]))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def _type_of(tensor: TensorInfo, wanted: Type) -> Type:
    if len(tensor.shape) == 1:
        return Type.F32
    return Type.Q8_0 if wanted in _OURS and tensor.shape[-1] % gguf.QK_K else wanted


def _quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    """The values as GGUF stores them. Raises ValueError where a type needs the CPU kernels and there are none."""
    if kind not in _OURS:
        return gguf.quantize(values, kind)
    library = native.library()
    if library is None:
        raise ValueError(f"{kind.name} is quantized by the CPU kernels, and there are none")
    return library.quantize(values, _OURS[kind])


def _read(checkpoint: Checkpoint, name: str, at: TensorInfo, config: Config) -> np.ndarray:
    """A tensor as GGUF has it: float32, queries and keys with the two halves of each head interleaved."""
    values = np.empty(at.shape, np.float32)
    checkpoint.read_into(name, values)
    for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if part in name:
            halves = values.reshape(heads, 2, config.head_dim // 2, *at.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(at.shape)
    return values


def _rope_factors(config: Config) -> np.ndarray | None:
    """What llama.cpp divides the plain frequencies by where they are scaled band by band, as in Llama 3.1."""
    if config.rope.kind != "llama3":
        return None
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return (config.rope.theta**-exponents / inverse_frequencies(config.rope)).astype(np.float32)


def _add_config(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config.rope
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    raw, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    vocab: dict[str, int] = raw["model"]["vocab"]
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = {at: token for token, at in {**vocab, **special}.items()}
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError("the tokens are not numbered from 0 without a gap")
    control = set(special.values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[at] for at in range(len(tokens))])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if at in control else gguf.TokenType.NORMAL for at in sorted(tokens)]
    )
    writer.add_token_merges([" ".join(pair) for pair in _pairs(raw["model"]["merges"])])
    for role, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
        if settings.get(role) in special:
            add(special[settings[role]])
    writer.add_add_bos_token(raw["post_processor"] is not None)
    if settings.get("chat_template"):
        writer.add_chat_template(settings["chat_template"])


def _pairs(merges: list[Any]) -> Iterator[list[str]]:
    for pair in merges:
        yield pair.split(" ") if isinstance(pair, str) else pair


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """The command line; argparse reports a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m max.bench.gguf_export", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a Llama checkpoint in the Hugging Face form")
    parser.add_argument("file", metavar="FILE", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES, default="f32", help="type of the matrices (default: f32)")
    given = parser.parse_args(argv)
    write_gguf(given.folder, given.file, given.type)


if __name__ == "__main__":
    main()
