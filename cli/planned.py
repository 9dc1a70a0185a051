"""Options of other MAX command lines that belong to later work: refused by name, never accepted and ignored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import click

from .. import ConfigError


@dataclass(frozen=True)
class Planned:
    """An option that is not there yet: a flag without a value, or one with."""

    name: str
    feature: str
    is_flag: bool = False


# Feature -> options, "!" marking those that take no value and have a --no- form.
_FEATURES = {
    "LoRA adapters": "enable-lora! lora-paths max-lora-rank max-num-loras",
    "speculative decoding": (
        "num-speculative-tokens speculative-method rejection-sampling-strategy relaxed-delta relaxed-topk"
        " synthetic-acceptance-rate use-relaxed-acceptance-for-thinking! draft-chat-template draft-config-file"
        " draft-data-parallel-degree draft-devices draft-enable-echo! draft-force-download!"
        " draft-huggingface-model-revision draft-huggingface-weight-revision draft-max-length draft-model-path"
        " draft-pool-embeddings! draft-quantization-encoding draft-rope-type draft-section-name"
        " draft-served-model-name draft-subfolder draft-trust-remote-code! draft-use-subgraphs!"
        " draft-vision-config-overrides draft-weight-path"
    ),
    "models that read images": "image_url max-vision-cache-entries vision-config-overrides",
    "models that make images": (
        "first-block-caching! taylorseer! taylorseer-cache-interval taylorseer-max-order taylorseer-warmup-steps"
        " teacache! teacache-coefficients teacache-rel-l1-thresh"
    ),
    "downloads from a model hub": "force-download! huggingface-model-revision huggingface-weight-revision",
    "checkpoints in several parts": "subfolder models model-override",
    "architectures from outside the package": "custom-architectures trust-remote-code! prefer-module-v3!",
    "more than one device": "data-parallel-degree ep-size ep-use-allreduce! use-vendor-ccl",
    "captured device graphs": "device-graph-capture! debug-verify-replay!",
    "separate prefill and decode": "pipeline-role",
    "key-value pages outside the device": "kv-connector kv-connector-config",
    "embeddings": "pool-embeddings!",
    "echo of the prompt": "enable-echo! enable-variable-logits!",
    "structured output": "enable-structured-output!",
    "reasoning parsers": "reasoning-parser",
    "profiling of devices": "gpu-profiling",
    "scheduling of many requests": (
        "decode-stall-timeout-s enable-prioritize-first-decode! execute-empty-batches! max-batch-input-tokens"
        " max-batch-size max-batch-total-tokens max-num-steps device-memory-utilization kv-cache-page-size"
    ),
    "serving": "served-model-name zmq-endpoint-base",
    "work on a server in parts": "headless eplb-stats task-arg",
    "a choice of kernels": "use-experimental-kernels use-subgraphs!",
    "switching off what costs nothing": "enable-penalties! enable-min-tokens! detokenize!",
    "deferred checks of the configuration": "defer-resolve! force! section-name",
    "timed runs of generate": "num-warmups",
}

PLANNED = {
    name.removesuffix("!"): Planned(name.removesuffix("!"), feature, name.endswith("!"))
    for feature, names in _FEATURES.items()
    for name in names.split()
}


def planned_error(name: str, shown_as: str = "") -> ConfigError | None:
    """The refusal of the option or setting called `name`, None when nothing of that name is planned."""
    planned = PLANNED.get(name) or PLANNED.get(name.replace("_", "-"))
    if planned is None:
        return None
    return ConfigError(
        f"{shown_as or '--' + planned.name} is planned: {planned.feature}",
        "Leave it out; it would have no effect in this release.",
    )


def planned_options(taken: Iterable[str]) -> list[click.Option]:
    """Hidden options that refuse themselves, for every planned name whose flag is not among `taken`."""
    real = set(taken)
    return [_refusing(planned) for planned in PLANNED.values() if f"--{planned.name}" not in real]


def _refusing(planned: Planned) -> click.Option:
    flag = f"--{planned.name}"

    def refuse(_context: click.Context, _option: click.Parameter, value: object) -> None:
        if value is not None:
            error = planned_error(planned.name)
            assert error is not None
            raise error

    declaration = [f"{flag}/--no-{planned.name}"] if planned.is_flag else [flag]
    return click.Option(declaration, hidden=True, is_eager=True, expose_value=False, default=None, callback=refuse)
