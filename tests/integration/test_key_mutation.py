"""Every setting flipped: another key, or the same graphs. What changes code behind the key's back fails here."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from max.bench.gguf_export import write_gguf
from max.cache import signing
from max.cache.key import make_key
from max.cli.model_command import pipeline_of
from max.cli.resolution import resolve
from max.cli.sections import PIPELINE_SECTIONS
from max.compiler import xla_lowering
from max.compiler.targets.target import Target
from max.models.build import build_text_pipeline
from max.runtime.checkpoint import Checkpoint
from max.runtime.preparation import Preparation
from max.runtime.wanted import Wanted
from max.serve.pipeline import preparation_of

BASE: dict[str, Any] = {
    "max_batch_size": 2,
    "max_batch_input_tokens": 2,
    "max_length": 64,
    "kv_cache_page_size": 16,
    "cache_policy": "off",
}
# Of each field, values that differ from BASE and from the default.
FLIPPED: dict[str, tuple[Any, ...]] = {
    "model_path": ("COPY",),
    "weight_path": ("COPY/model.safetensors",),
    "rope_type": ("normal", "neox"),
    "quantization_encoding": ("bfloat16", "q8_0"),
    "max_length": (32, 65),
    "devices": ("cpu:native",),
    "use_subgraphs": (False,),
    "max_batch_size": (1, 3),
    "max_batch_input_tokens": (1, 4),
    "max_batch_total_tokens": (64, 100),
    "device_memory_utilization": (0.5, 0.25),
    "kv_cache_page_size": (8, 32),
    "kv_cache_format": ("float32", "bfloat16"),
    "num_threads": (1,),
    "enable_prefix_caching": (False,),
    "enable_chunked_prefill": (False,),
    "enable_in_flight_batching": (False,),
    "enable_overlap_scheduler": (True, False),
    "enable_prioritize_first_decode": (True,),
    "max_queue_size_tg": (1,),
    "min_batch_size_tg": (1,),
    "kvcache_ce_watermark": (0.5,),
    "chunked_prefill_min_chunk_size": (1,),
    "max_request_input_tokens": (32,),
    "prefill_schedule_interval": (2,),
    "prefill_coalesce_min_pending": (1,),
    "prefill_coalesce_max_held_steps": (1,),
    "ce_delay_ms": (1.0,),
    "cache_dir": ("/elsewhere",),
    "cache_policy": ("readonly",),
    "max_cache_size": ("1GB",),
    "max_cache_age": (3.0,),
    "min_free_space": ("1GB",),
    "cache_remote": ("file:///elsewhere",),
    "require_signed": (True,),
    "trusted_keys": ("COPY/trusted-keys",),
    "sign_with": ("COPY/signing-key",),
    "export_mefs": ("/elsewhere",),
    "precompiled_mefs": (("/elsewhere",),),
}

FLIPPED_FOR_GPUS: dict[str, Any] = {"autotune_results": "COPY/config.json", "use_vendor_blas": True}


@pytest.fixture(scope="module")
def copied(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("copied") / "model"))
    (folder / "trusted-keys").write_text(signing.new_key(folder / "signing-key"))
    (folder / "trusted-keys").chmod(0o600)
    write_gguf(folder, folder.with_name("model.gguf"))
    return folder


def preparation(model: Path, settings: Mapping[str, Any], target: Target | None = None) -> Preparation:
    resolved = resolve(PIPELINE_SECTIONS, {"model_path": model, **BASE, **settings}, None, {})
    config = pipeline_of(resolved)
    section = config.model
    assert section.model_path is not None
    checkpoint = Checkpoint.open(section.model_path, section.weight_path, section.rope_order)

    def text() -> Any:
        raise AssertionError("nothing is bound here")

    return preparation_of(config, checkpoint, text, lambda *_: None, target=target, keep_weights=False)


def graphs(prepared: Preparation, wanted: Wanted) -> list[str]:
    """The jaxprs of the smallest step and of its samplers."""
    module = build_text_pipeline(prepared.checkpoint.architecture, wanted.config, wanted.limits, wanted.weights)
    platform = prepared.target.xla_platform
    chosen = [graph for name, graph in module.graphs.items() if name.endswith("_r1") and not name.startswith("step_t2")]
    return [xla_lowering.lower(graph, platform).jaxpr for graph in chosen]


@pytest.fixture(scope="module")
def base(model: Path) -> tuple[Wanted, list[str]]:
    prepared = preparation(model, {})
    wanted = prepared.wanted()
    return wanted, graphs(prepared, wanted)


def test_every_setting_is_flipped_here() -> None:
    fields = {name for section in PIPELINE_SECTIONS for name in section.model_fields}
    assert fields == FLIPPED.keys() | FLIPPED_FOR_GPUS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [pair for name, values in FLIPPED.items() for pair in ((name, value) for value in values)]
)
def test_a_flipped_setting_is_another_key_or_the_same_graphs(model: Path, copied: Path, base, name, value) -> None:
    if isinstance(value, str):
        value = value.replace("COPY", str(copied))
    # Which files of safetensors refuse.
    others = {"weight_path": copied.with_name("model.gguf")} if name == "rope_type" else {}
    prepared = preparation(model, {name: value, **others})
    wanted = prepared.wanted()
    if wanted.key.digest == base[0].key.digest:
        assert graphs(prepared, wanted) == base[1]


@pytest.mark.parametrize(("name", "value"), FLIPPED_FOR_GPUS.items())
def test_a_flipped_setting_for_gpus_is_another_key(model: Path, copied: Path, name: str, value: Any) -> None:
    if isinstance(value, str):
        value = value.replace("COPY", str(copied))
    target = Target.parse("cuda:sm_90")
    flipped, plain = (preparation(model, settings, target).wanted() for settings in ({name: value}, {}))
    assert flipped.key.digest != plain.key.digest


def test_the_comparison_sees_a_difference(model: Path, base) -> None:
    """The graphs of a setting that is compiled in do differ."""
    prepared = preparation(model, {"kv_cache_page_size": 32})
    wanted = prepared.wanted()
    assert wanted.key.digest != base[0].key.digest and graphs(prepared, wanted) != base[1]


@functools.singledispatch
def changed(value: object) -> Any:
    raise AssertionError(f"no other value for {value!r}")


changed.register(bool, lambda value: not value)
changed.register(int, lambda value: value + 1)
changed.register(float, lambda value: value * 2 + 1)
changed.register(str, lambda value: value + "x")
changed.register(tuple, lambda value: (*value, 1.0))


def test_every_fact_of_the_model_is_in_the_key(base) -> None:
    config, factors = base[0].config, base[0].key.factors
    assert factors["config"] == make_key({"config": dataclasses.asdict(config)}).factors["config"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = dataclasses.fields(value)[0]
            other = dataclasses.replace(value, **{inner.name: changed(getattr(value, inner.name))})  # type: ignore[type-var]
        else:
            other = changed(value)
        flipped = {**factors, "config": dataclasses.asdict(dataclasses.replace(config, **{field.name: other}))}
        assert make_key(flipped).digest != base[0].key.digest, field.name
