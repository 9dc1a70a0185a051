"""Which template is read, what it may do, and what becomes of one that fails or never ends."""

import itertools
import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max import ConfigError, ModelError, RequestError
from max.serve import template_growth, template_limits
from max.serve.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate
from max.serve.text_files import FolderText

MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] = MESSAGES, **variables: Any) -> str:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}, limit_s=0.3).render(messages, **variables)


def test_the_variables_of_a_template() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}|{{ add_generation_prompt }}|{{ tools }}|{{ mood }}|{{ unknown }}"
    assert render(source, mood="calm") == "<s>hi|True|None|calm|"
    assert render(source, add_generation_prompt=False, bos_token="") == "hi|False|None||"


def test_blocks_leave_no_lines_and_loops_can_be_left() -> None:
    source = (
        "{% for i in range(9) %}\n    {% if i == 2 %}{% break %}{% endif %}\n{{ i }} of {{ loop.length }}\n{% endfor %}"
    )
    assert render(source) == "0 of 9\n1 of 9\n"


def test_tojson_escapes_no_html_and_keeps_the_order() -> None:
    value = {"b": "<é>&'", "a": 1}
    assert render("{{ value | tojson }}", value=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ value | tojson(indent=2) }}", value=value) == json.dumps(value, ensure_ascii=False, indent=2)


def test_strftime_now_and_the_generation_tag() -> None:
    assert render("{{ strftime_now('%Y') }}") == f"{datetime.now():%Y}"
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_what_the_template_says_against_a_conversation_reaches_the_user() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.hint


def test_chat_template_jinja_wins_over_the_config(tmp_path: Path) -> None:
    assert ChatTemplate.load(FolderText(tmp_path)) is None
    config = {"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<bos>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert loaded(tmp_path).render(MESSAGES) == "config <bos>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert loaded(tmp_path).render(MESSAGES) == "file <bos>"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert loaded(tmp_path).render(MESSAGES) == "plain"
    assert loaded(tmp_path).render(MESSAGES, tools=[{"type": "function"}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("plain file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools file")
    assert loaded(tmp_path).render(MESSAGES) == "plain file"
    assert loaded(tmp_path).render(MESSAGES, tools=[]) == "tools file"


def test_an_override_is_a_template_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    (other := tmp_path / "other.jinja").write_text("other {{ 1 }}")
    for override, expected in [("{{ 1 + 1 }}", "2"), (str(other), "other 1"), (other, "other 1")]:
        assert loaded(tmp_path, override).render(MESSAGES) == expected
    with pytest.raises(ConfigError, match="absent"):
        ChatTemplate.load(FolderText(tmp_path), tmp_path / "absent.jinja")


@pytest.mark.parametrize("value", [7, ["x"], [{"name": "default"}], {"default": "x"}])
def test_a_config_with_a_template_of_another_type_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ModelError, match="chat_template"):
        ChatTemplate.load(FolderText(tmp_path))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ messages", "line 1"),
        ("{% nonsense %}", "nonsense"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), "bytes"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ absent.field.deeper }}", "UndefinedError"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError|cannot be compiled|too many"),
    ],
)
def test_a_broken_template_is_named(source: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        render(source)
    assert "--chat-template" in caught.value.hint


DOUBLED = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.3 s"),
        ("{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}", "longer than 0.3 s"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "longer than"),
        ("{% for i in range(99999) %}" + "text" * 100 + "{% endfor %}", "writes more"),
        (DOUBLED % ("'ab'", "{% set ns.x = ns.x ~ ns.x %}"), "value of more"),
        (DOUBLED % ("'ab'", "{% set ns.x = ns.x + ns.x %}"), "value of more"),
        (DOUBLED % ("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"), "value of more"),
        (DOUBLED % ("'ab'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), "writes more"),
        (DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"), "value of more"),
        (DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}{% if i == 59 %}{{ ns.x | tojson }}{% endif %}"), "value of"),
        (DOUBLED % ("99", "{% set ns.x = ns.x * ns.x %}"), "bits"),
        ("{{ 9 ** 999999999 }}", "bits"),
        ("{{ 'a' * 999999999 }}", "value of more"),
        ("{{ 999999999 * [1] }}", "value of more"),
        ("{{ 'a'.center(999999999) }}", "value of more"),
        ("{{ 'a' | center(999999999) }}", "count or width"),
        ("{{ 'a' | indent(999999999) }}", "value of more"),
        ("{{ messages | tojson(indent=999999999) }}", "count or width"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{{ '%999999999d' | format(1) }}", "width"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "width"),
        ("{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", "value of more"),
        ("{% set a = 'a' * 99999 %}{{ a | replace('a', a) }}", "value of more"),
        ("{% set a = 'a' * 99999 %}{{ range(99999) | join(a) }}", "value of more"),
        ("{{ 'a'.translate({97: 'b'}) }}", "translate"),
    ],
)
def test_a_template_without_end_is_stopped(source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock after few looks at it; by what it builds or writes even where no time goes by at all."""
    if words.startswith("value of"):
        monkeypatch.setattr(template_growth, "MAX_SIZE", 2**18)  # a sixteenth: lists are looked at item by item
    looks = itertools.count()
    per_look = 0.1 if words.startswith("longer than") else 0
    monkeypatch.setattr(template_limits, "time", SimpleNamespace(monotonic=lambda: next(looks) * per_look))
    with pytest.raises(ModelError, match=words):
        render(source)
    assert not per_look or next(looks) <= 5, "one at the beginning, and four until more than 0.3 s are over"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ('' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_the_sandbox_shows_no_internals_and_changes_no_message(source: str) -> None:
    messages = [dict(MESSAGES[0])]
    try:
        shown = render(source, messages)
    except ModelError:
        shown = ""
    assert "class" not in shown and "module" not in shown
    assert messages == MESSAGES


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(RequestError, match="no messages"):
        render("{{ bos_token }}", [])


def test_a_conversation_that_makes_too_long_a_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt of"):
        render("{{ messages[0].content }}", [{"role": "user", "content": "x" * (2 * 1024 * 1024 + 1)}])


def loaded(folder: Path, override: str | Path | None = None) -> ChatTemplate:
    template = ChatTemplate.load(FolderText(folder), override)
    assert template is not None
    return template
