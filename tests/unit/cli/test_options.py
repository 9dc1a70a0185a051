"""Sections become options: names are flags, docstrings are help, and not given stays None."""

from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import ByteSize, Field

from max.cache.fields import Section, setting
from max.cli.options import as_yaml, config_options, resolve


class Engine(Section):
    """Settings of every form."""

    model_path: Path = setting(compiles=False, flag="--model")
    """Folder of the checkpoint.

    A second paragraph that the help leaves out.
    """

    max_batch_size: int = setting(8, compiles=True, ge=1, le=256)
    """Requests answered
    at once."""

    fast: bool = setting(True, compiles=False)
    """Whether to hurry."""

    overlap: bool | None = setting(None, compiles=False)
    """Decided by the model where not given."""

    mode: Literal["on", "off"] = setting("on", compiles=False)
    """Mode of the engine."""

    encoding: str | None = setting(None, compiles=True, choices=("float32", "bfloat16"))
    """Encoding of the weights."""

    stop: tuple[str, ...] = setting((), compiles=False)
    """Text that ends an answer; may be given several times."""

    stop_token_ids: list[Annotated[int, Field(ge=0)]] = setting(default_factory=list, compiles=False)
    """Tokens that end an answer."""

    cap: ByteSize = setting(ByteSize(2 * 10**9), compiles=False)
    """Bytes to use."""

    inner: float | None = setting(None, compiles=False, gt=0, hidden=True)
    """For experiments."""


@click.command("engine")
@config_options(Engine)
@click.pass_context
def engine(context: click.Context, /, config_file: Path | None, print_config: bool, **given: Any) -> None:
    context.obj.append(given)
    if print_config:
        click.echo(as_yaml(resolve([Engine], given, config_file, {})), nl=False)


def given_by(*arguments: str) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    result = CliRunner().invoke(engine, arguments, obj=seen)
    assert result.exit_code == 0, result.output
    return seen[0]


def help_text() -> str:
    return " ".join(CliRunner().invoke(engine, ["--help"]).output.split())


def test_options_that_are_not_given_say_so() -> None:
    assert given_by() == {name: () if name == "stop" else None for name in Engine.model_fields}


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--model", "a/b"], "model_path", "a/b"),
        (["--model-path", "a/b"], "model_path", "a/b"),
        (["--max-batch-size", "7"], "max_batch_size", "7"),
        (["--fast"], "fast", True),
        (["--no-fast"], "fast", False),
        (["--no-overlap"], "overlap", False),
        (["--mode", "off"], "mode", "off"),
        (["--encoding", "float32"], "encoding", "float32"),
        (["--stop", "a,b", "--stop", "c"], "stop", ("a,b", "c")),
        (["--stop-token-ids", "1, 2"], "stop_token_ids", "1, 2"),
        (["--inner", "0.5"], "inner", "0.5"),
    ],
)
def test_a_flag_reaches_the_command_under_the_name_of_its_field(arguments: list[str], name: str, value: Any) -> None:
    assert given_by(*arguments)[name] == value


def test_the_help_is_the_first_paragraph_with_limits_and_default() -> None:
    text = help_text()
    assert "--model, --model-path PATH Folder of the checkpoint." in text
    assert "second paragraph" not in text
    assert (
        "--max-batch-size INTEGER Requests answered at once. [an integer of at least 1 and of at most 256; default: 8]"
        in text
    )
    assert "--fast / --no-fast Whether to hurry. [default: yes]" in text
    assert "--overlap / --no-overlap Decided by the model where not given. --mode" in text
    assert "--mode [on|off]" in text and "--encoding [float32|bfloat16]" in text
    assert "--stop-token-ids INTEGER,... Tokens that end an answer." in text
    assert "--cap SIZE Bytes to use. [default: 2.0GB]" in text
    assert "--inner" not in text


def test_a_value_outside_the_choices_is_refused() -> None:
    result = CliRunner().invoke(engine, ["--mode", "perhaps"], obj=[])
    assert result.exit_code == 2 and "'on', 'off'" in result.output


def test_the_printed_config_gives_itself_again(tmp_path: Path) -> None:
    first = CliRunner().invoke(
        engine,
        ["--print-config", "--model", "m", "--mode", "off", "--stop", "a,b", "--stop-token-ids", "1,2", "--cap", "1GB"],
        obj=[],
    )
    (file := tmp_path / "settings.yaml").write_text(first.output)
    second = CliRunner().invoke(engine, ["--print-config", "--config-file", str(file)], obj=[])
    assert second.output == first.output
    assert "mode: 'off'\n" in first.output and "max_batch_size: 8\n" in first.output
