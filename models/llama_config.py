"""Llama: what its config.json says and which tensors its checkpoint holds. Imports no jax.

Source: transformers 5.x `LlamaConfig`; tensor names are those of `LlamaForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import ConfigError, ModelError
from ..compiler.limits import CacheGroup, PageFormat, page_bytes
from ..compiler.panels import Packing
from ..compiler.weights import Split, Weight, WeightTable
from .config_keys import boolean, number, optional, refuse_unsupported, require
from .rope import Rope

SHARDING: dict[str, Split] = {
    "qkv": "outputs", "qkv_bias": "outputs", "o": "inputs",
    "gate_up": "outputs", "gate_up_bias": "outputs", "down": "inputs",
    "embed": "outputs", "head": "outputs",
}  # fmt: skip
"""How the devices of a mesh share the weights: heads and columns of the MLP, so that the results of `o` and `down` are
added up, and rows of the vocabulary. Source: Megatron-LM, arXiv:1909.08053, section 3."""

_VOCABULARY = ("embed", "head")
_MOST_LAYERS = 4096  # a table of the weights of a damaged number of layers would fill the memory


@dataclass(frozen=True)
class Config:
    """Everything of config.json that changes the computation; equal configs share executables."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rope: Rope
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @staticmethod
    def from_hf(raw: dict[str, Any]) -> Config:
        """Parses config.json; raises ModelError for a missing key or one that this architecture would get wrong."""
        refuse_unsupported(raw, "llama")
        hidden, heads = require(raw, "hidden_size"), require(raw, "num_attention_heads")
        kv_heads = optional(raw, "num_key_value_heads", heads)
        if heads % kv_heads or (raw.get("head_dim") is None and hidden % heads):
            raise ModelError(
                f"config.json: {heads} attention heads do not divide by {kv_heads} of keys, or {hidden} not by them",
                "Check hidden_size, num_attention_heads and num_key_value_heads in config.json.",
            )
        head_dim = optional(raw, "head_dim", hidden // heads)
        return Config(
            vocab_size=require(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=require(raw, "intermediate_size"),
            num_layers=require(raw, "num_hidden_layers", most=_MOST_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=number(raw, "rms_norm_eps", 1e-6),
            max_position=optional(raw, "max_position_embeddings", 2048),
            rope=Rope.from_hf(raw, head_dim),
            tied=boolean(raw, "tie_word_embeddings"),
            attention_bias=boolean(raw, "attention_bias"),
            mlp_bias=boolean(raw, "mlp_bias"),
        )

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def part(self, devices: int) -> Config:
        """What one device of a mesh computes of each layer; raises ConfigError for what cannot be split so."""
        shared = {
            "attention heads": self.num_heads,
            "heads of keys and values": self.num_kv_heads,
            "columns of the MLP": self.intermediate_size,
        }
        if uneven := [f"{count} {what}" for what, count in shared.items() if count % devices]:
            possible = [n for n in range(2, devices) if not any(count % n for count in shared.values())]
            fewer = f"Give {' or '.join(map(str, possible))} of them, or one." if possible else "Give one device."
            raise ConfigError(f"the model cannot be split over {devices} devices: it has {' and '.join(uneven)}", fewer)
        return replace(
            self,
            num_heads=self.num_heads // devices,
            num_kv_heads=self.num_kv_heads // devices,
            intermediate_size=self.intermediate_size // devices,
        )

    def sharding(self, devices: int) -> dict[str, Split]:
        """How so many devices share the weights, by name; a vocabulary that they cannot share stays whole."""
        if self.vocab_size % devices:
            return {name: split for name, split in SHARDING.items() if name not in _VOCABULARY}
        return SHARDING

    def cache_groups(self, page_tokens: int, page_format: PageFormat = "float32") -> tuple[CacheGroup, ...]:
        """One group: every layer sees the whole row."""
        nbytes = page_bytes(self.num_layers, self.kv_width, page_tokens, page_format)
        return (CacheGroup("full", tuple(range(self.num_layers)), page_tokens, nbytes),)

    def weights(self, packing: Packing = "", own: Mapping[str, Packing] | None = None) -> WeightTable:
        """The graph's weights and the checkpoint tensors that each is made of, in the order of the computation.

        packing, own: how matrices are packed for the CPU kernels, see `WeightTable.pack`

        Packed for the CPU kernels, the embedding lies as a head does, and is the head where they are tied.
        """
        rows = (self.vocab_size, self.hidden_size)
        embed = Weight("embed", rows, ("model.embed_tokens.weight",))
        table = [replace(embed, shape=rows[::-1], transposed=True) if packing else embed]
        for layer in range(self.num_layers):
            table += self._block(f"blocks.{layer}", f"model.layers.{layer}")
        table.append(Weight("norm", (self.hidden_size,), ("model.norm.weight",)))
        if not self.tied:
            table.append(Weight("head", rows[::-1], ("lm_head.weight",), transposed=True))
        # Exporters write a copy of the tied head, and buffers that older versions of transformers kept.
        ignored = ("lm_head.weight",) if self.tied else ()
        return WeightTable(tuple(table), ignored=(*ignored, "*.rotary_emb.inv_freq")).pack(packing, own)

    def _block(self, to: str, source: str) -> list[Weight]:
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.query_width, self.kv_width
        qkv = [f"{source}.self_attn.{part}_proj" for part in "qkv"]
        gate_up = [f"{source}.mlp.{part}_proj" for part in ("gate", "up")]
        o, down = f"{source}.self_attn.o_proj", f"{source}.mlp.down_proj"
        block = [
            Weight(f"{to}.input_norm", (d,), (f"{source}.input_layernorm.weight",)),
            _matrix(f"{to}.qkv", d, qkv, (q, kv, kv)),
            _matrix(f"{to}.o", q, [o], (d,)),
            Weight(f"{to}.post_norm", (d,), (f"{source}.post_attention_layernorm.weight",)),
            replace(_matrix(f"{to}.gate_up", d, gate_up, (f, f)), gated=not self.mlp_bias),
            _matrix(f"{to}.down", f, [down], (d,)),
        ]
        if self.attention_bias:
            block += [_bias(f"{to}.qkv_bias", qkv, (q, kv, kv)), _bias(f"{to}.o_bias", [o], (d,))]
        if self.mlp_bias:
            block += [_bias(f"{to}.gate_up_bias", gate_up, (f, f)), _bias(f"{to}.down_bias", [down], (d,))]
        return block


def _matrix(name: str, rows: int, modules: list[str], widths: tuple[int, ...]) -> Weight:
    sources = tuple(f"{module}.weight" for module in modules)
    return Weight(name, (rows, sum(widths)), sources, widths, transposed=True)


def _bias(name: str, modules: list[str], widths: tuple[int, ...]) -> Weight:
    return Weight(name, (sum(widths),), tuple(f"{module}.bias" for module in modules), widths)
