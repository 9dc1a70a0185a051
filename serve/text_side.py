"""The text side of a checkpoint: tokenizer, chat template and defaults, and from them requests to an engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import RequestError
from ..cache.config import CacheConfig
from ..runtime.config import SamplingConfig
from ..runtime.sampling import SamplingParams
from .chat_template import ChatTemplate
from .generation_defaults import GenerationDefaults
from .text_files import find_text
from .text_output import StopRules
from .tokenizer import Tokenizer

_DEFAULT_TOP_K = 255


@dataclass(frozen=True)
class TextSide:
    """What a checkpoint says about text; `template` is None where it has none.

    files: those that all this was read from, besides the weights
    """

    files: list[Path]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults

    @staticmethod
    def load(
        model: Path,
        chat_template: str | None = None,
        weight_path: Path | None = None,
        cache: CacheConfig | None = None,
    ) -> TextSide:
        """Reads all of a folder or GGUF file, or of the GGUF file `weight_path` for a folder without a tokenizer.

        `chat_template` is a template, or the path of one, to use instead of the checkpoint's. A tokenizer that has
        to be converted is kept in `cache`. Raises ModelError.
        """
        files = find_text(model, weight_path, cache)
        tokenizer = Tokenizer.load(files)
        override: str | Path | None = chat_template
        if chat_template and "{" not in chat_template:
            override = Path(chat_template)
        template = ChatTemplate.load(files, override)
        return TextSide(files.present, tokenizer, template, GenerationDefaults.load(files, tokenizer))

    def prompt_ids(self, prompt: str, *, apply_chat_template: bool | None) -> list[int]:
        """The tokens of a prompt: as a user's message where there is a template, else as text.

        apply_chat_template: None for "where there is one"; True without one raises RequestError
        """
        if apply_chat_template and self.template is None:
            raise RequestError(
                "the model has no chat template", "Give one with --chat-template, or leave --apply-chat-template out."
            )
        if self.template is None or apply_chat_template is False:
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        text = self.template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sampling(self, config: SamplingConfig) -> SamplingParams:
        """What was asked for, else the checkpoint's defaults, else temperature 1 and top-k 255. Raises RequestError."""
        own = self.defaults

        def chosen(name: str, fallback: float) -> Any:
            given, default = getattr(config, name), getattr(own, name)
            return given if given is not None else default if default is not None else fallback

        greedy_by_default = own.do_sample is False and config.temperature is None
        return SamplingParams(
            temperature=0.0 if greedy_by_default else chosen("temperature", 1.0),
            top_k=chosen("top_k", _DEFAULT_TOP_K),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            repetition_penalty=chosen("repetition_penalty", 1.0),
            frequency_penalty=config.frequency_penalty,
            presence_penalty=config.presence_penalty,
            seed=secrets.randbits(32) if config.seed is None else config.seed,
        )

    def stop_rules(self, config: SamplingConfig, room: int, vocab_size: int) -> StopRules:
        """Where an answer ends, at the latest after `room` tokens, which the context has left. Raises RequestError.

        vocab_size: of the model; the checkpoint's own stop tokens may lie outside, and then never come
        """
        if outside := [token_id for token_id in config.stop_token_ids if token_id >= vocab_size]:
            raise _outside("stop_token_ids holds", outside[0], vocab_size)
        wanted = self.defaults.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
        return StopRules(
            max_new_tokens=room if wanted in (None, -1) else min(wanted, room),
            min_new_tokens=config.min_new_tokens,
            stop=config.stop,
            stop_token_ids=frozenset(config.stop_token_ids),
            eos_token_ids=frozenset(token_id for token_id in self.defaults.stop_token_ids if token_id < vocab_size),
            ignore_eos=config.ignore_eos,
        )


def check_prompt(prompt_ids: Sequence[int], max_length: int, vocab_size: int) -> int:
    """The tokens that the context has left for an answer; raises RequestError when none can follow this prompt."""
    if not prompt_ids:
        raise RequestError("the prompt has no tokens", "Give text that the tokenizer does not drop.")
    if max(prompt_ids) >= vocab_size:
        raise _outside("the tokenizer gives", max(prompt_ids), vocab_size)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens, and the context has room for {max_length}",
            "Shorten the prompt so that an answer fits, or raise --max-length as far as the model allows.",
        )
    return room


def _outside(what: str, token_id: int, vocab_size: int) -> RequestError:
    return RequestError(
        f"{what} {token_id}, and the model has no such token", f"Its token ids go from 0 to {vocab_size - 1}."
    )
