"""Options of other MAX command lines that belong to later work, and those that only some commands have.

They are refused by name, never accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click

from .. import ConfigError


@dataclass(frozen=True)
class Planned:
    """An option that is not there yet, or that other commands have: a flag without a value, or one with.

    feature:  what it waits for, or what it asks for
    declined: why that is not going to be there
    """

    name: str
    feature: str
    is_flag: bool = False
    commands: str = ""
    declined: str = ""


# Feature -> options, "!" marking those that take no value and have a --no- form.
_FEATURES = {
    "LoRA adapters": "enable-lora! lora-paths max-lora-rank max-num-loras",
    "speculative decoding": (
        "num-speculative-tokens speculative-method rejection-sampling-strategy relaxed-delta relaxed-topk"
        " synthetic-acceptance-rate use-relaxed-acceptance-for-thinking! use-greedy-acceptance! logit-penalties!"
        " adaptive-speculative-min-batch-size adaptive-speculative-widths enable-spec-decode-mixed-batches!"
        " num-speculative-tokens-mixed-batch num-speculative-tokens-per-batch-size draft-proposal"
        " draft-chat-template draft-config-file draft-data-parallel-degree draft-devices draft-enable-echo!"
        " draft-force-download! draft-huggingface-model-revision draft-huggingface-weight-revision draft-max-length"
        " draft-model-path draft-pool-embeddings! draft-quantization-encoding draft-rope-type draft-section-name"
        " draft-served-model-name draft-sliding-window draft-subfolder draft-trust-remote-code!"
        " draft-use-dummy-weights! draft-use-subgraphs! draft-vision-config-overrides draft-weight-path"
    ),
    "models that read images": (
        "image_url max-vision-cache-entries vision-config-overrides vision-cache-utilization"
        " max-media-preprocess-cache-idle-seconds max-video-preprocess-cache-bytes max-vision-preprocess-cache-bytes"
    ),
    "models that make images": (
        "first-block-caching! taylorseer! taylorseer-cache-interval taylorseer-max-order taylorseer-warmup-steps"
        " teacache! teacache-coefficients teacache-rel-l1-thresh"
    ),
    "downloads from a model hub": "force-download! huggingface-model-revision huggingface-weight-revision",
    "checkpoints in several parts": "subfolder models model-override",
    "checkpoints without their weights": "use-dummy-weights!",
    "architectures from outside the package": "custom-architectures trust-remote-code! prefer-module-v3!",
    "more than one device": "data-parallel-degree ep-size ep-use-allreduce! use-vendor-ccl execute-empty-batches!",
    "captured device graphs": "device-graph-capture! debug-verify-replay!",
    "separate prefill and decode": "pipeline-role decode-request-ttl-s",
    "key-value pages outside the device": "kv-connector kv-connector-config kv-cache-hash-algo kv-cache-hash-seed",
    "embeddings": "pool-embeddings! task",
    "tools": "tool-parser tool-call-policy",
    "structured output": "enable-structured-output! structured-output-backend structured-output-any-whitespace!",
    "reasoning parsers": "reasoning-parser thinking-temperature emit-reasoning-content!",
    "layers that see a window of tokens": "sliding-window",
    "profiling of devices": "gpu-profiling",
    "work on a server in parts": "headless eplb-stats task-arg",
    "a choice of kernels": "use-experimental-kernels sample-on-host!",
    "another tokenizer": "tokenizer-impl",
    "switching off what costs nothing": "detokenize!",
    "deferred checks of the configuration": "defer-resolve! force! section-name",
}

# Commands -> options that only they have.
_ELSEWHERE = {
    "serve": "served-model-name zmq-endpoint-base decode-stall-timeout-s enable-echo! enable-variable-logits!",
    "generate and max serve": "enable-penalties! enable-min-tokens!",
    "generate": "num-warmups",
}


def _table(rows: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    for what, names in rows.items():
        for name in names.split():
            yield what, name.removesuffix("!"), name.endswith("!")


PLANNED = {name: Planned(name, feature, is_flag) for feature, name, is_flag in _table(_FEATURES)}
ELSEWHERE = {name: Planned(name, "", is_flag, commands) for commands, name, is_flag in _table(_ELSEWHERE)}

_DECLINED = (
    Planned(
        "max-num-steps",
        "several steps for each time that the scheduler runs",
        declined="Requests would wait for all of them. What they save, --enable-overlap-scheduler saves with one step.",
    ),
)
DECLINED = {each.name: each for each in _DECLINED}
_KNOWN = PLANNED | ELSEWHERE | DECLINED


def planned_error(name: str, shown_as: str = "") -> ConfigError | None:
    """The refusal of the option or setting called `name`, None when no command has one or plans for it."""
    planned = _KNOWN.get(name) or _KNOWN.get(name.replace("_", "-"))
    if planned is None:
        return None
    if planned.commands:
        return ConfigError(
            f"{shown_as or '--' + planned.name} is a setting of max {planned.commands} alone",
            "Leave it out here, where it would have no effect.",
        )
    if planned.declined:
        return ConfigError(f"{shown_as or '--' + planned.name} is not taken: {planned.feature}", planned.declined)
    return ConfigError(
        f"{shown_as or '--' + planned.name} is planned: {planned.feature}",
        "Leave it out; it would have no effect in this release.",
    )


def planned_options(taken: Iterable[str]) -> list[click.Option]:
    """Hidden options that refuse themselves, for every name of a planned or declined option, or of another command's,
    whose flag is not among `taken`."""
    real = set(taken)
    return [_refusing(planned) for planned in _KNOWN.values() if f"--{planned.name}" not in real]


def _refusing(planned: Planned) -> click.Option:
    flag = f"--{planned.name}"

    def refuse(_context: click.Context, _option: click.Parameter, value: object) -> None:
        if value is not None:
            error = planned_error(planned.name)
            assert error is not None
            raise error

    declaration = [f"{flag}/--no-{planned.name}"] if planned.is_flag else [flag]
    return click.Option(declaration, hidden=True, is_eager=True, expose_value=False, default=None, callback=refuse)
