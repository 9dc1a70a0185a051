"""Renders a conversation into the text that a model was trained on, with the checkpoint's own Jinja template.

Source: what a template may use follows transformers 5 `apply_chat_template`: raise_exception, strftime_now, tojson
without HTML escapes, loop controls, the `generation` tag, and the special tokens by role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from .. import ConfigError, ModelError, RequestError
from .template_growth import LimitExceeded
from .template_limits import MAX_OUTPUT_CHARS, LimitedEnvironment, metered
from .text_files import TextFiles
from .tokenizer import read_special_tokens

MAX_TEMPLATE_BYTES = 64 * 1024
RENDER_LIMIT_S = 5.0


class ChatTemplate:
    """A checkpoint's chat templates by name, compiled. Safe to use from several threads."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], limit_s: float = RENDER_LIMIT_S
    ) -> None:
        """`sources`: name -> template, one of them "default"; `special_tokens`: bos_token, eos_token, ... -> text.

        Raises: ModelError when a template is larger than 64 KiB or is no valid Jinja.
        """
        self._special_tokens = dict(special_tokens)
        self._limit_s = limit_s
        environment = _environment()
        self._templates = {name: _compiled(environment, name, source) for name, source in sources.items()}

    @staticmethod
    def load(files: TextFiles, override: str | Path | None = None) -> ChatTemplate | None:
        """Reads the template of a checkpoint, None when it has none.

        chat_template.jinja (and additional_chat_templates/) wins over `chat_template` of tokenizer_config.json.
        override: a template, or the path of one, used in the place of the checkpoint's
        Raises: ModelError for a broken template or damaged file, ConfigError for an `override` that cannot be read.
        """
        sources = files.templates() or _from_config(files) if override is None else _from_override(override)
        if not sources:
            return None
        return ChatTemplate(sources, read_special_tokens(files))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`; encode it without adding special tokens, as it holds them.

        add_generation_prompt: whether to open the assistant's turn
        tools: function schemas; they choose the template named "tool_use" where there is one
        extra: further variables of the template, such as enable_thinking or documents
        Raises: RequestError with the template's own words when it refuses the conversation, or when the prompt is too
            large; ModelError when the template itself fails or runs too long.
        """
        if not messages:
            raise RequestError("the conversation has no messages", "Send at least one message.")
        text = self._run(
            "tool_use" if tools is not None and "tool_use" in self._templates else "default",
            {
                **self._special_tokens,
                "documents": None,
                **extra,
                # Clients send content=null beside tool calls; templates expect a key that is not there.
                "messages": [{key: value for key, value in each.items() if value is not None} for each in messages],
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        if len(text) > MAX_OUTPUT_CHARS:
            raise RequestError(
                f"the conversation makes a prompt of {len(text):,} characters; {MAX_OUTPUT_CHARS:,} are allowed",
                "Send fewer or shorter messages.",
            )
        return text

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        """What the template writes. Raises: RequestError for its own words, ModelError for a fault of it."""
        try:
            with metered(self._limit_s):
                return self._templates[name].render(variables)
        except _Refusal as refusal:
            raise RequestError(
                f"the model's chat template refuses the conversation: {refusal}",
                "Change the messages accordingly; the order of roles is the usual cause.",
            ) from None
        except LimitExceeded as limit:
            raise _broken(name, f"stopped, because {limit}") from limit
        except Exception as error:  # a template can raise whatever its expressions raise
            raise _broken(name, f"failed with {type(error).__name__}: {error}") from error


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """Accepts {% generation %} ... {% endgeneration %}, which marks the assistant's text for training only."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compiled(environment: LimitedEnvironment, name: str, source: str) -> jinja2.Template:
    size = len(source.encode(errors="replace"))
    if size > MAX_TEMPLATE_BYTES:
        raise _broken(name, f"has {size:,} bytes, more than the {MAX_TEMPLATE_BYTES:,} allowed")
    try:
        return environment.limited(source)
    except jinja2.TemplateSyntaxError as error:
        raise _broken(name, f"is not valid Jinja: {error.message} (line {error.lineno})") from error
    except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
        raise _broken(name, f"cannot be compiled: {error}") from error


def _broken(name: str, what: str) -> ModelError:
    return ModelError(
        f"the chat template {name!r} {what}", "Correct the template, or give another one with --chat-template FILE."
    )


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _from_override(override: str | Path) -> dict[str, str]:
    if isinstance(override, str) and ("{{" in override or "{%" in override):
        return {"default": override}
    try:
        return {"default": Path(override).read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the chat template {override} cannot be read: {error}",
            "Give --chat-template a template or the path of one.",
        ) from error


def _from_config(files: TextFiles) -> dict[str, str]:
    value = files.json("tokenizer_config.json").get("chat_template")
    match value:
        case None:
            return {}
        case str():
            return {"default": value}
        case [*entries] if all(_is_named_template(entry) for entry in entries):
            return {entry["name"]: entry["template"] for entry in entries}
    raise ModelError(
        f"{files.path('tokenizer_config.json')}: chat_template is neither text nor a list of named templates",
        "Download the file again, or give a template with --chat-template FILE.",
    )


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
