"""One run of `max generate`: the request, its answer piece by piece, and the statistics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from .. import ConfigError
from ..cache.config import CacheConfig
from ..compiler.counters import COUNTERS
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import FeaturesConfig, ModelConfig, SamplingConfig, SchedulingConfig
from ..runtime.engine import Engine
from ..runtime.request import Request
from ..runtime.step_results import Failure
from ..runtime.text_engine import Started, start
from ..serve.text_output import CompletionText, StopRules
from ..serve.text_side import TextSide, check_prompt
from .model_command import make_preparation, model_folder, pipeline_of
from .progress import ProgressBar
from .resolution import Settings
from .sections import GenerateConfig
from .statistics import Statistics, peak_memory_bytes, process_seconds

logger = logging.getLogger(__name__)


@dataclass
class _Answer:
    """One answer as it came about; seconds since the request was given to the engine."""

    text: str = ""
    tokens: int = 0
    finish_reason: str = ""
    first_token_seconds: float = 0.0


class Generation:
    """One run of the command."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.config = settings, settings.of(GenerateConfig)
        if not self.config.prompt:
            what = "no --prompt was given" if self.config.prompt is None else "the prompt is empty"
            raise ConfigError(what, 'Give one, for example --prompt "robot:".')
        self.sampling = _allowed(settings.of(SamplingConfig), settings.of(FeaturesConfig))

    def run(self) -> None:
        folder = model_folder(self.settings.of(ModelConfig))
        started, text, prompt = self._start(folder)
        startup = process_seconds()
        room = check_prompt(prompt, started.engine.limits.max_length, started.engine.vocab_size)
        rules = text.stop_rules(self.sampling, room, started.engine.vocab_size)
        params = text.sampling(self.sampling)

        def request(number: int) -> Request:
            return Request(
                str(number), prompt, params, rules.max_new_tokens, rules.min_new_tokens, rules.ending_token_ids
            )

        for number in range(self.config.num_warmups):
            _generate(started.engine, request(number), text, rules, lambda piece: None)
        show = (lambda piece: None) if self.config.json_output else _stream
        before = _rates(started.engine)
        answer = _generate(started.engine, request(-1), text, rules, show)
        prefill, decode = (after - then for after, then in zip(_rates(started.engine), before, strict=True))
        statistics = Statistics(
            model=str(folder),
            prompt_tokens=len(prompt),
            new_tokens=answer.tokens,
            finish_reason=answer.finish_reason,
            seed=params.seed,
            source=started.report.reason,
            startup_seconds=startup,
            first_token_seconds=answer.first_token_seconds,
            prefill_rate=prefill.rate,
            decode_rate=decode.rate,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._report(answer, statistics)

    def _start(self, folder: Path) -> tuple[Started, TextSide, list[int]]:
        """Checks all that was asked for first, so that a mistake is told before anything is compiled."""
        with ProgressBar() as progress:
            model = self.settings.of(ModelConfig)
            cache = self.settings.of(CacheConfig)
            checkpoint = Checkpoint.open(folder, model.weight_path, model.rope_order, cache)
            text = TextSide.load(folder, self.config.chat_template, model.weight_path, cache)
            text.sampling(self.sampling)
            prompt = text.prompt_ids(self.config.prompt or "", apply_chat_template=self.config.apply_chat_template)

            def check(max_length: int, vocab_size: int) -> None:
                text.stop_rules(self.sampling, check_prompt(prompt, max_length, vocab_size), vocab_size)

            preparation = make_preparation(self.settings, checkpoint, text, progress, keep_weights=True, check=check)
            scheduling = self.settings.of(SchedulingConfig)
            use = pipeline_of(self.settings).device_use
            started = start(preparation.run, preparation.store, len(prompt), scheduling=scheduling, use=use)
        logger.debug("preparation %s", started.report)
        return started, text, prompt

    def _report(self, answer: _Answer, statistics: Statistics) -> None:
        if self.config.json_output:
            click.echo(json.dumps({"text": answer.text, **statistics.to_json()}, ensure_ascii=False))
        else:
            click.echo()
            for line in statistics.lines():
                click.echo(line, err=True)
        logger.debug("graphs and executables %s", COUNTERS)


def _allowed(sampling: SamplingConfig, features: FeaturesConfig) -> SamplingConfig:
    """How tokens are drawn without what is switched off. Raises ConfigError where that was asked for."""
    wanted = {
        "--frequency-penalty": ("penalties", sampling.frequency_penalty),
        "--presence-penalty": ("penalties", sampling.presence_penalty),
        "--repetition-penalty": ("penalties", (sampling.repetition_penalty or 1.0) - 1.0),
        "--min-new-tokens": ("min-tokens", sampling.min_new_tokens),
    }
    off = {"penalties": not features.enable_penalties, "min-tokens": not features.enable_min_tokens}
    for flag, (feature, value) in wanted.items():
        if value and off[feature]:
            raise ConfigError(f"{flag} is given with --no-enable-{feature}", "Leave one of them out.")
    return sampling.model_copy(update={"repetition_penalty": 1.0}) if off["penalties"] else sampling


def _generate(
    engine: Engine, request: Request, text: TextSide, rules: StopRules, show: Callable[[str], None]
) -> _Answer:
    """Runs one request to its end and shows each piece of text when it is complete."""
    completion = CompletionText(text.tokenizer.stream(), rules)
    answer = _Answer()
    began = time.perf_counter()
    engine.add(request)
    while completion.finish_reason is None:
        time.sleep(engine.pause_s)
        for token in engine.step():
            if isinstance(token, Failure):
                raise token.error
            if not answer.first_token_seconds:
                answer.first_token_seconds = time.perf_counter() - began
            delta = completion.push(token.id)
            if token.finish_reason is not None and completion.finish_reason is None:
                rest = completion.finish(token.finish_reason)
                answer.text += delta.text
                show(delta.text)
                delta = rest
            answer.text += delta.text
            show(delta.text)
    engine.abort(request.id)  # a stop string ends the text before the engine knows
    answer.tokens, answer.finish_reason = completion.num_tokens, completion.finish_reason
    return answer


def _stream(piece: str) -> None:
    if piece:
        click.echo(piece, nl=False)


@dataclass(frozen=True)
class _Work:
    """Tokens computed and the seconds that they took."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __sub__(self, earlier: _Work) -> _Work:
        return _Work(self.tokens - earlier.tokens, self.seconds - earlier.seconds)


def _rates(engine: Engine) -> tuple[_Work, _Work]:
    stats = engine.stats
    return (
        _Work(stats.prefill_tokens, stats.prefill_seconds),
        _Work(stats.decode_tokens, stats.decode_seconds),
    )
