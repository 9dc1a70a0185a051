"""Sections and their classified fields."""

from typing import Literal

import pytest
from pydantic import ValidationError

from max.cache.config import CacheConfig
from max.cache.fields import Section, compile_factors, setting, setting_of, unclassified


class Pages(Section):
    """Sizes of the pages."""

    page_tokens: int = setting(16, compiles=True, ge=1, le=1024)
    """Tokens in a page."""

    encoding: str = setting("float32", compiles=True, choices=("float32", "bfloat16"), flag="--quantization-encoding")
    """How weights are stored."""

    buckets: tuple[int, ...] = setting((1, 2, 4), compiles=True)
    """Lengths that are compiled."""

    log_every: int = setting(10, compiles=False, hidden=True, environment="LOG_EVERY")
    """Steps between log lines."""


class Careless(Section):
    forgotten: int = 3
    mode: Literal["a", "b"] = setting("a", compiles=False)


def test_docstrings_are_the_help():
    assert Pages.model_fields["page_tokens"].description == "Tokens in a page."


def test_a_field_says_what_it_is():
    found = {name: setting_of(name, field) for name, field in Pages.model_fields.items()}
    declared = {name: declared for name, declared in found.items() if declared is not None}
    assert declared["page_tokens"].flag == "--page-tokens"
    assert declared["encoding"].flag == "--quantization-encoding"
    assert declared["encoding"].choices == ("float32", "bfloat16")
    assert (declared["log_every"].hidden, declared["log_every"].environment) == (True, "LOG_EVERY")


def test_only_compiling_fields_are_factors():
    assert compile_factors(Pages(page_tokens=32)) == {
        "page_tokens": 32,
        "encoding": "float32",
        "buckets": [1, 2, 4],
    }


def test_an_unclassified_field_is_found_and_counts_as_compiling():
    assert unclassified(Careless) == ["forgotten"]
    assert unclassified(Pages) == []
    assert compile_factors(Careless()) == {"forgotten": 3}


def test_two_sections_join():
    assert compile_factors(Careless(), Pages()).keys() == {"forgotten", "page_tokens", "encoding", "buckets"}


@pytest.mark.parametrize(
    "given", [{"page_tokens": 0}, {"page_tokens": 2000}, {"encoding": "int3"}, {"unknown": 1}, {"page_tokens": "many"}]
)
def test_refuses_values_outside_the_declaration(given):
    with pytest.raises(ValidationError):
        Pages(**given)


def test_refusal_of_a_choice_names_the_choices():
    with pytest.raises(ValidationError, match="must be one of float32, bfloat16"):
        Pages(encoding="int3")


def test_defaults_are_checked_too():
    class Wrong(Section):
        size: int = setting(0, compiles=False, ge=1)

    with pytest.raises(ValidationError):
        Wrong()


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Pages().page_tokens = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_default_factory():
    class Made(Section):
        names: list[str] = setting(default_factory=list, compiles=True)

    assert Made().names == []
    assert unclassified(Made) == []


def test_cache_config_is_classified_and_never_compiles():
    assert unclassified(CacheConfig) == []
    assert compile_factors(CacheConfig()) == {}
