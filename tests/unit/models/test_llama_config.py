"""Llama's config.json: both key styles, refusals, and the tensors of a checkpoint against transformers' own parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import LlamaConfig

from max import ConfigError, ModelError
from max.compiler.limits import PageFormat
from max.compiler.weights import WeightTable
from max.models.llama_config import Config
from max.models.rope import Rope

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "parity" / "llama.json").read_text(encoding="utf-8")
)
SMALL = CONFIGS["mha_default"]
GROUPED = CONFIGS["gqa2_llama3_tied"]


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_reads(name):
    config = Config.from_hf(CONFIGS[name])
    theirs: Any = LlamaConfig(**json.loads(json.dumps(CONFIGS[name])))
    assert (config.head_dim, config.num_heads, config.num_kv_heads) == (
        theirs.head_dim,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert (config.norm_eps, config.max_position, config.tied) == (
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
    )
    assert (config.attention_bias, config.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert (config.rope.kind, config.rope.theta) == (
        theirs.rope_parameters["rope_type"],
        theirs.rope_parameters["rope_theta"],
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_parses_to_the_same(name):
    """Checkpoints of older key style are rewritten by transformers 5: executables must still be shared."""
    saved = json.loads(LlamaConfig(**json.loads(json.dumps(CONFIGS[name]))).to_json_string(use_diff=False))
    assert Config.from_hf(saved) == Config.from_hf(CONFIGS[name])


def test_defaults_are_those_of_transformers():
    bare: dict[str, Any] = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    bare |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = LlamaConfig(**bare)
    config = Config.from_hf(bare)
    assert config == Config(8, 8, 8, 1, 2, 2, 4, theirs.rms_norm_eps, theirs.max_position_embeddings, Rope(4, 10000.0))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [..., None, 0, -1, 2.5, "64", True])
def test_sizes_are_needed(key, value):
    raw = {name: SMALL[name] for name in SMALL if name != key} | ({} if value is ... else {key: value})
    with pytest.raises(ModelError, match=f"{key} is {'missing' if value is ... else repr(value)}") as refused:
        Config.from_hf(raw)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "su"}}, "'su'"),
        ({"num_key_value_heads": 3}, "4 attention heads"),
        ({"num_key_value_heads": -4}, "num_key_value_heads is -4"),
        ({"hidden_size": 66}, "66"),
        ({"head_dim": "16"}, "head_dim is '16'"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5"),
    ],
)
def test_refuses_what_it_would_get_wrong(change, named):
    with pytest.raises(ModelError, match=named) as refused:
        Config.from_hf(SMALL | change)
    assert refused.value.hint


def test_a_damaged_number_of_layers_is_refused_before_weights_are_listed():
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000000"):
        Config.from_hf({**SMALL, "num_hidden_layers": 10**9})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_text_is_no_truth(key):
    with pytest.raises(ModelError, match=f"{key} is 'false'"):
        Config.from_hf({**SMALL, key: "false"})
    assert Config.from_hf({**SMALL, key: None}) == Config.from_hf({**SMALL, key: False})


def test_names_every_refused_key_at_once():
    with pytest.raises(ModelError, match=r"hidden_act='gelu'.*sliding_window=8"):
        Config.from_hf(SMALL | {"sliding_window": 8, "hidden_act": "gelu"})


def test_harmless_values_pass():
    harmless = {"sliding_window": None, "quantization_config": None, "pretraining_tp": 1, "hidden_act": "silu"}
    assert Config.from_hf(SMALL | harmless) == Config.from_hf(SMALL)


def test_head_dim_may_differ_from_the_share_of_the_hidden_size():
    config = Config.from_hf(GROUPED)
    assert (config.head_dim, config.query_width, config.kv_width) == (32, 128, 64)


def sources(config: Config) -> dict[str, tuple[int, ...]]:
    return dict(pair for weight in config.weights().weights for pair in weight.source_shapes())


def test_a_tied_embedding_is_kept_once():
    for packing in ("", "bfloat16", "q4_0"):
        tied, untied = (
            Config.from_hf(GROUPED | {"tie_word_embeddings": tie}).weights(packing) for tie in (True, False)
        )
        names = [weight.name for weight in tied.weights]
        assert "embed" in names and "head" not in names
        assert [weight.name for weight in untied.weights] == [*names, "head"]
        embed, head = (next(weight for weight in untied.weights if weight.name == name) for name in ("embed", "head"))
        assert (embed.packed, head.packed) == (packing, packing)
        assert embed.stored_shape == (head.stored_shape if packing else head.stored_shape[::-1])


def test_tied_checkpoints_may_hold_a_head():
    tied, untied = (Config.from_hf(GROUPED | {"tie_word_embeddings": tie}) for tie in (True, False))
    assert "lm_head.weight" not in sources(tied) and tied.weights().ignores("lm_head.weight")
    assert sources(untied)["lm_head.weight"] == (320, 64) and not untied.weights().ignores("lm_head.weight")
    assert untied.weights().ignores("model.layers.0.self_attn.rotary_emb.inv_freq")


def test_biases_follow_their_flags():
    plain, biased = (set(sources(Config.from_hf(SMALL | {"attention_bias": on, "mlp_bias": on}))) for on in (0, 1))
    modules = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert biased - plain == {f"model.layers.{layer}.{module}.bias" for layer in range(2) for module in modules}


def test_weight_table_survives_json():
    table = Config.from_hf(CONFIGS["gqa8_linear_biases"]).weights()
    assert WeightTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_pages_take_half_the_bytes_in_bfloat16():
    config = Config.from_hf(SMALL)
    (wide,), (narrow,) = (config.cache_groups(16, page_format) for page_format in get_args(PageFormat))
    assert wide.page_bytes == 2 * narrow.page_bytes == config.num_layers * 16 * 2 * config.kv_width * 4


def test_a_part_has_its_share_of_heads_and_columns() -> None:
    config = Config.from_hf(GROUPED)
    part = config.part(2)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (2, 1, config.intermediate_size // 2)
    assert (part.hidden_size, part.head_dim, part.vocab_size) == (64, config.head_dim, config.vocab_size)
    assert config.part(1) == config


@pytest.mark.parametrize(
    ("devices", "what", "hint"),
    [
        (4, "split over 4 devices: it has 2 heads of keys and values", "Give 2 of them, or one."),
        (3, "it has 4 attention heads and 2 heads of keys and values", "Give 2 of them, or one."),
    ],
)
def test_what_cannot_be_split_is_named(devices: int, what: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        Config.from_hf(GROUPED).part(devices)
    assert caught.value.hint == hint


def test_a_vocabulary_that_does_not_divide_stays_whole() -> None:
    config = Config.from_hf(GROUPED)
    assert set(config.sharding(2)) - set(config.sharding(3)) == {"embed", "head"}
    assert {weight.split for weight in config.weights().split(config.sharding(3)).weights} == {"", "outputs", "inputs"}
