"""What is planned is refused by its name, on the command line and in a file, and never shown in the help."""

import click
import pytest
from click.testing import CliRunner

from max import ConfigError
from max.cli.main import group
from max.cli.planned import DECLINED, ELSEWHERE, PLANNED, Planned, planned_error, planned_options


@click.command()
@click.option("--prompt")
@click.option("--num-warmups", type=int)
def command(prompt: str | None, num_warmups: int | None) -> None:
    click.echo(f"ran {prompt} {num_warmups}")


command.params += planned_options(taken=["--prompt", "--num-warmups"])


REFUSED = {name: each for name, each in (PLANNED | ELSEWHERE | DECLINED).items() if name != "num-warmups"}


@pytest.mark.parametrize("planned", REFUSED.values(), ids=REFUSED)
def test_each_is_refused_by_name(planned: Planned) -> None:
    flag = f"--{planned.name}"
    given = [[flag], [f"--no-{planned.name}"]] if planned.is_flag else [[flag, "value"], [f"{flag}=", "--prompt", "x"]]
    for arguments in given:
        result = CliRunner().invoke(command, arguments)
        assert isinstance(result.exception, ConfigError)
        why = f"a setting of max {planned.commands} alone" if planned.commands else f"planned: {planned.feature}"
        why = f"not taken: {planned.feature}" if planned.declined else why
        assert result.exception.message == f"{flag} is {why}"
        assert result.exception.hint and result.exception.kind == "user"
        assert "ran" not in result.output


def test_a_real_option_is_not_refused() -> None:
    assert CliRunner().invoke(command, ["--num-warmups", "3"]).output == "ran None 3\n"


def test_the_value_of_another_option_is_not_taken_for_one() -> None:
    assert CliRunner().invoke(command, ["--prompt", "--enable-lora"]).output == "ran --enable-lora None\n"


def test_the_help_shows_none() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert not [name for name in REFUSED if name in text]


def test_names_with_underscores_and_unknown_ones() -> None:
    assert planned_error("max_num_loras") is not None
    assert planned_error("prompt") is None


def test_what_is_said_to_belong_to_a_command_does() -> None:
    real = {name: {flag for each in _command(name).params for flag in _shown(each)} for name in ("generate", "serve")}
    for name, option in ELSEWHERE.items():
        have = [command for command in ("generate", "serve") if f"--{name}" in real[command]]
        assert option.commands == " and max ".join(have)
    assert not {f"--{name}" for name in PLANNED} & (real["generate"] | real["serve"])


def _command(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def _shown(parameter: click.Parameter) -> list[str]:
    return [] if isinstance(parameter, click.Option) and parameter.hidden else parameter.opts
