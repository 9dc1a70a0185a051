"""Precedence, names that are wrong, values that are wrong: what `resolve` makes of each."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, Field, model_validator

from max import ConfigError
from max.cache.fields import Section, setting
from max.cli.resolution import Settings, as_yaml, resolve


class Engine(Section):
    """Some settings."""

    model_path: Path = setting("here", compiles=False, flag="--model")
    max_batch_size: int = setting(8, compiles=True, ge=1, le=256)
    fast: bool = setting(True, compiles=False)
    mode: Literal["on", "off"] = setting("on", compiles=False)


class Text(Section):
    """More settings."""

    name: str | None = setting(None, compiles=False, environment="OTHER_NAME")
    stop: tuple[str, ...] = setting((), compiles=False)
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = setting((), compiles=False)
    cap: ByteSize | None = setting(None, compiles=False)
    temperature: float = setting(1.0, compiles=False, ge=0)


class Pair(Section):
    """Two settings with a rule between them."""

    low: int = setting(0, compiles=False)
    high: int = setting(1, compiles=False)

    @model_validator(mode="after")
    def _in_order(self) -> "Pair":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Needed(Section):
    """A setting without a default."""

    where: Path = setting(compiles=False)


def resolved(
    tmp_path: Path, yaml: str | None = None, environ: dict[str, str] | None = None, command: str = "", **flags: object
) -> Settings:
    file = None
    if yaml is not None:
        (file := tmp_path / "settings.yaml").write_text(yaml)
    return resolve([Engine, Text], flags, file, environ or {}, command=command)


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    yaml, environ = "max_batch_size: 2", {"MAX_MAX_BATCH_SIZE": "3"}
    assert resolved(tmp_path).of(Engine).max_batch_size == 8
    assert resolved(tmp_path, yaml).of(Engine).max_batch_size == 2
    assert resolved(tmp_path, yaml, environ).of(Engine).max_batch_size == 3
    assert resolved(tmp_path, yaml, environ, max_batch_size="4").of(Engine).max_batch_size == 4


def test_sections_come_in_the_order_asked_for(tmp_path: Path) -> None:
    engine, text = resolved(tmp_path, fast=False, name="n")
    assert isinstance(engine, Engine) and engine.fast is False
    assert isinstance(text, Text) and text.name == "n"


def test_a_flag_that_is_not_given_changes_nothing(tmp_path: Path) -> None:
    settings = resolved(tmp_path, "stop: [x]\nfast: false", fast=None, stop=())
    assert settings.of(Text).stop == ("x",) and settings.of(Engine).fast is False


def test_the_variable_of_a_field_counts_behind_its_own_name(tmp_path: Path) -> None:
    assert resolved(tmp_path, environ={"OTHER_NAME": "other"}).of(Text).name == "other"
    both = {"OTHER_NAME": "other", "MAX_NAME": "own"}
    assert resolved(tmp_path, environ=both).of(Text).name == "own"
    assert resolved(tmp_path, environ={"MAX_NAME": ""}).of(Text).name is None


def test_lists_from_everywhere(tmp_path: Path) -> None:
    assert resolved(tmp_path, stop=("a,b", "c")).of(Text).stop == ("a,b", "c")
    assert resolved(tmp_path, "stop: a,b").of(Text).stop == ("a,b",)
    assert resolved(tmp_path, "stop: [a, 'b\n']").of(Text).stop == ("a", "b ")
    assert resolved(tmp_path, environ={"MAX_STOP": "a,b"}).of(Text).stop == ("a", "b")
    for settings in (
        resolved(tmp_path, stop_token_ids="1, 2"),
        resolved(tmp_path, "stop_token_ids: 1,2"),
        resolved(tmp_path, "stop_token_ids: [1, 2]"),
        resolved(tmp_path, environ={"MAX_STOP_TOKEN_IDS": "1,2"}),
    ):
        assert settings.of(Text).stop_token_ids == (1, 2)


def test_on_and_off_are_words_in_the_file(tmp_path: Path) -> None:
    assert resolved(tmp_path, "mode: off").of(Engine).mode == "off"
    for word in ("false", "no", "off", "False"):
        assert resolved(tmp_path, f"fast: {word}").of(Engine).fast is False
    assert resolved(tmp_path, "name: 2026-01-02").of(Text).name == "2026-01-02"


def test_settings_of_one_command_win_over_the_top_and_those_of_others_are_passed_over(tmp_path: Path) -> None:
    yaml = "max_batch_size: 2\nwarm_cache_config:\n  max_batch_size: 3\ngenerate_config: {whatever: 1}\n"
    assert resolved(tmp_path, yaml, command="warm-cache").of(Engine).max_batch_size == 3
    assert resolved(tmp_path, yaml, command="list").of(Engine).max_batch_size == 2
    assert resolved(tmp_path, yaml).of(Engine).max_batch_size == 2
    with pytest.raises(ConfigError, match="unknown setting whatever"):
        resolved(tmp_path, yaml, command="generate")
    with pytest.raises(ConfigError, match="generate_config holds no settings"):
        resolved(tmp_path, "generate_config: 3", command="generate")


@pytest.mark.parametrize(
    ("yaml", "message", "hint"),
    [
        ("max_batchsize: 2", "unknown setting max_batchsize", "max_batch_size"),
        ("max-batch-size: 2", "unknown setting max-batch-size", "max_batch_size"),
        ("zzz: 2", "unknown setting zzz", "--print-config"),
        ("enable_lora: true", "enable_lora in .* is planned: LoRA adapters", "Leave it out"),
        ("a: [", "line 1", "YAML"),
        ("fast: true\nfast: false", "line 2.*fast stands twice", "YAML"),
        ("- fast", "holds no settings", "name: value"),
        ("1: 2", "holds no settings", "name: value"),
        ("name: !!python/object/apply:os.getcwd []", "line 1", "YAML"),
        ("name: \x00", "cannot be read", "YAML"),
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, yaml: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(tmp_path, yaml)
    assert hint in caught.value.hint and "settings.yaml" in caught.value.message


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert resolved(tmp_path, "# nothing yet\n") == resolved(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        resolve([Engine], {}, tmp_path / "absent.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve([Engine], {}, tmp_path, {})


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"max_batch_size": "0"}, "--max-batch-size: '0'", "of at least 1 and of at most 256"),
        ({"max_batch_size": "many"}, "--max-batch-size: 'many'", "an integer"),
        ({"mode": "perhaps"}, "--mode: 'perhaps'", "one of on, off"),
        ({"fast": "perhaps"}, "--fast: 'perhaps'", "true or false"),
        ({"stop_token_ids": "1,x"}, "--stop-token-ids: 'x'", "separated by commas"),
        ({"stop_token_ids": "-1"}, "--stop-token-ids: '-1'", "of at least 0"),
        ({"cap": "lots"}, "--cap: 'lots'", "a size such as"),
        ({"temperature": "nan"}, "--temperature: 'nan'", "a number of at least 0"),
        ({"temperature": "-1", "mode": "x"}, "--mode: 'x'", "one of"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, flags: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, None, None, "", **flags)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_wrong_value_says_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^max_batch_size in .*settings\.yaml: 0 should be"):
        resolved(tmp_path, "max_batch_size: 0")
    with pytest.raises(ConfigError, match=r"^MAX_MAX_BATCH_SIZE: '0' should be"):
        resolved(tmp_path, environ={"MAX_MAX_BATCH_SIZE": "0"})
    with pytest.raises(ConfigError, match=r"^--model: 3"):
        resolved(tmp_path, model_path=3)


def test_all_wrong_values_of_a_section_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-batch-size: .*; --mode: "):
        resolved(tmp_path, max_batch_size="0", mode="x")


def test_rules_between_settings_and_missing_ones() -> None:
    with pytest.raises(ConfigError, match="low is above high"):
        resolve([Pair], {"low": "3"}, None, {})
    with pytest.raises(ConfigError, match="--where is required"):
        resolve([Needed], {}, None, {})


@given(
    batch=st.integers(1, 256),
    mode=st.sampled_from(["on", "off"]),
    name=st.none() | st.text(),
    stop=st.lists(st.text()),
    ids=st.lists(st.integers(0, 2**31)),
    cap=st.none() | st.integers(0, 2**60),
    temperature=st.floats(0, allow_infinity=False),
)
def test_printed_settings_resolve_to_themselves(
    tmp_path_factory: pytest.TempPathFactory, batch: int, mode: str, name: str | None, stop: list[str], ids: list[int],
    cap: int | None, temperature: float,
) -> None:  # fmt: skip
    sections = (
        Engine.model_validate({"max_batch_size": batch, "mode": mode}),
        Text.model_validate(
            {"name": name, "stop": stop, "stop_token_ids": ids, "cap": cap, "temperature": temperature}
        ),
    )
    file = tmp_path_factory.getbasetemp() / "printed.yaml"
    file.write_text(as_yaml(sections), encoding="utf-8")
    assert resolve([Engine, Text], {}, file, {}) == sections
