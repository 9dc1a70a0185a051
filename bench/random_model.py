"""Writes a Llama checkpoint with random weights: `python -m max.bench.random_model DIR [--size 5m|349m]`.

The folder has the Hugging Face form, so that other servers load it too. Weights are streamed: memory stays small.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, BinaryIO

import numpy as np

from ..models.llama_config import Config

SIZES: dict[str, dict[str, int]] = {
    "5m": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "349m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
_DTYPES = {"f32": ("F32", 4, "float32"), "bf16": ("BF16", 2, "bfloat16")}
_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
_BLOCK_VALUES = 1 << 20
_SCALE = 0.02

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_checkpoint(
    folder: Path, size: str = "5m", dtype: str = "f32", seed: int = 0, *, max_position: int = 2048
) -> None:
    """Writes the checkpoint; equal arguments give equal bytes. Raises KeyError for an unknown size or dtype."""
    stored, item_bytes, dtype_name = _DTYPES[dtype]
    vocab_size = SIZES[size]["vocab_size"]
    ids = {token: vocab_size - len(_SPECIAL) + at for at, token in enumerate(_SPECIAL)}
    begin, end = ids["<|begin_of_text|>"], [ids["<|end_of_text|>"], ids["<|im_end|>"]]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SIZES[size],
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": dtype_name,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end})
    _write_json(folder / "tokenizer.json", _tokenizer(vocab_size, ids))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|im_end|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": _TEMPLATE,
        },
    )
    _write_weights(folder / "model.safetensors", Config.from_hf(config), stored, item_bytes, seed)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_weights(file: Path, config: Config, stored: str, item_bytes: int, seed: int) -> None:
    shapes = [source for weight in config.weights().weights for source in weight.source_shapes()]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        nbytes = math.prod(shape) * item_bytes
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for at, (_, shape) in enumerate(shapes):
            _write_values(stream, np.random.default_rng((seed, at)), shape, stored)


def _write_values(stream: BinaryIO, random: np.random.Generator, shape: tuple[int, ...], stored: str) -> None:
    """Norms (vectors) are ones; matrices are normal with a standard deviation of 0.02."""
    left = math.prod(shape)
    while left:
        count = min(left, _BLOCK_VALUES)
        values = np.ones(count, np.float32)
        if len(shape) > 1:
            random.standard_normal(out=values, dtype=np.float32)
            values *= _SCALE
        stream.write((values if stored == "F32" else _bfloat16(values)).data)
        left -= count


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values as uint16, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _tokenizer(vocab_size: int, special: dict[str, int]) -> dict[str, Any]:
    """A byte-level BPE with an entry for every id, so that whatever a random model generates is text."""
    vocab = _byte_characters()
    merges = []
    for left, right in islice(_merges(), vocab_size - len(vocab) - len(special)):
        merges.append([left, right])
        vocab.append(left + right)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": at, "content": token, **flags} for token, at in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: at for at, token in enumerate(vocab)} | special,
            "merges": merges,
        },
    }


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte, as GPT-2 numbers them (`bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def _merges() -> Iterator[tuple[str, str]]:
    """Merges that make all pairs of letters, then all triples, then fours; the first letter may be a space."""
    first = [chr(0x120), *ascii_lowercase]
    pairs = [a + b for a, b in product(first, ascii_lowercase)]
    yield from product(first, ascii_lowercase)
    yield from product(pairs, ascii_lowercase)
    yield from product(pairs, [pair for pair in pairs if pair[0] != first[0]])


def main(argv: list[str] | None = None) -> None:
    """The command line; argparse reports a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m max.bench.random_model", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write, made if it is not there")
    parser.add_argument("--size", choices=SIZES, default="5m", help="number of parameters (default: 5m)")
    parser.add_argument("--dtype", choices=_DTYPES, default="f32", help="type of the stored weights (default: f32)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal files (default: 0)")
    parser.add_argument("--max-position", type=int, default=2048, help="tokens of its context (default: 2048)")
    given = parser.parse_args(argv)
    write_checkpoint(given.folder, given.size, given.dtype, given.seed, max_position=given.max_position)


if __name__ == "__main__":
    main()
