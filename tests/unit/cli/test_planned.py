"""What is planned is refused by its name, on the command line and in a file, and never shown in the help."""

import click
import pytest
from click.testing import CliRunner

from max import ConfigError
from max.cli.planned import PLANNED, Planned, planned_error, planned_options


@click.command()
@click.option("--prompt")
@click.option("--max-batch-size", type=int)
def command(prompt: str | None, max_batch_size: int | None) -> None:
    click.echo(f"ran {prompt} {max_batch_size}")


command.params += planned_options(taken=["--prompt", "--max-batch-size"])


REFUSED = {name: planned for name, planned in PLANNED.items() if name != "max-batch-size"}


@pytest.mark.parametrize("planned", REFUSED.values(), ids=REFUSED)
def test_each_is_refused_by_name(planned: Planned) -> None:
    flag = f"--{planned.name}"
    given = [[flag], [f"--no-{planned.name}"]] if planned.is_flag else [[flag, "value"], [f"{flag}=", "--prompt", "x"]]
    for arguments in given:
        result = CliRunner().invoke(command, arguments)
        assert isinstance(result.exception, ConfigError)
        assert result.exception.message == f"{flag} is planned: {planned.feature}"
        assert result.exception.hint and result.exception.kind == "user"
        assert "ran" not in result.output


def test_a_real_option_is_not_refused() -> None:
    assert CliRunner().invoke(command, ["--max-batch-size", "3"]).output == "ran None 3\n"


def test_the_value_of_another_option_is_not_taken_for_one() -> None:
    assert CliRunner().invoke(command, ["--prompt", "--enable-lora"]).output == "ran --enable-lora None\n"


def test_the_help_shows_none() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert not [name for name in REFUSED if name in text]


def test_names_with_underscores_and_unknown_ones() -> None:
    assert planned_error("max_num_loras") is not None
    assert planned_error("prompt") is None
