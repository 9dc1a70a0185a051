"""The architectures there are, as data: what `max list` shows and a key needs, without importing any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from .. import UnsupportedArchitecture

if TYPE_CHECKING:
    from ..compiler.limits import CacheGroup, PageFormat
    from ..compiler.panels import Packing
    from ..compiler.weights import Split, WeightTable


class Config(Protocol):
    """What every architecture's parsed config offers; each has more fields of its own."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    def weights(self, packing: Packing = ..., own: Mapping[str, Packing] | None = ...) -> WeightTable: ...
    def cache_groups(self, page_tokens: int, page_format: PageFormat) -> tuple[CacheGroup, ...]: ...
    def part(self, devices: int) -> Config: ...
    def sharding(self, devices: int) -> Mapping[str, Split]: ...


@dataclass(frozen=True)
class Architecture:
    """One architecture by the name that config.json gives it; modules are relative to this package."""

    name: str
    config_module: str
    model_module: str
    encodings: tuple[str, ...]
    formats: tuple[str, ...]
    tasks: tuple[str, ...]
    cache_strategies: tuple[str, ...]
    example_repo_ids: tuple[str, ...]


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="LlamaForCausalLM",
            config_module=".llama_config",
            model_module=".llama",
            encodings=("float32", "bfloat16", "q8_0", "q6_k", "q4_k", "q4_0"),
            formats=("safetensors", "gguf"),
            tasks=("text-generation",),
            cache_strategies=("paged",),
            example_repo_ids=(
                "meta-llama/Llama-3.1-8B-Instruct",
                "meta-llama/Llama-3.2-1B-Instruct",
                "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
                "HuggingFaceTB/SmolLM2-135M-Instruct",
            ),
        ),
    )
}


def find(name: str) -> Architecture:
    """The architecture called `name`; raises UnsupportedArchitecture, naming near ones."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = get_close_matches(name, ARCHITECTURES)
    hint = f"Near ones: {', '.join(near)}. " if near else ""
    raise UnsupportedArchitecture(
        f"the architecture {name!r} is not supported", f"{hint}`max list` shows the architectures there are."
    )


def load_config(architecture: Architecture, raw: dict[str, Any]) -> Config:
    """Parses config.json with the architecture's own module, the only one imported; raises ModelError."""
    return _PARSERS[architecture.config_module](raw)


def _llama(raw: dict[str, Any]) -> Config:
    from .llama_config import Config

    return Config.from_hf(raw)


_PARSERS: dict[str, Callable[[dict[str, Any]], Config]] = {".llama_config": _llama}
