"""Every way a command can end: the two lines on stderr, the exit code, and what was imported for it."""

import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from max import CapacityError, ConfigError, MaxError, __version__
from max.cli import commands, main
from max.cli.commands import CommandEntry

OWN_FAULT = "This is a fault of max; `--log-level debug` shows where."


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Puts a function behind `max generate`."""
    level = logging.getLogger("max").level

    def put(action: Callable[[], object]) -> None:
        module = types.ModuleType("max.cli.generate")
        module.__dict__["command"] = click.command("generate")(action)
        monkeypatch.setitem(sys.modules, "max.cli.generate", module)

    yield put
    logging.getLogger("max").setLevel(level)


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("wrong", "do this"), 2, ["error: wrong", "hint: do this"]),
        (ConfigError("several\nlines", "of\n  text"), 2, ["error: several lines", "hint: of text"]),
        (CapacityError("full", "wait"), 3, ["error: full", "hint: wait"]),
        (MaxError("broken"), 1, ["error: broken"]),
        (KeyError("x"), 1, ["error: internal error: KeyError: 'x'", f"hint: {OWN_FAULT}"]),
        (click.UsageError("odd"), 2, ["error: odd", "hint: `max generate --help` shows what there is."]),
        (KeyboardInterrupt(), 130, []),
        (click.Abort(), 130, []),
    ],
)  # fmt: skip
def test_every_error_is_two_lines_and_a_code(
    command, capsys, error: BaseException, code: int, lines: list[str]
) -> None:
    command(raising(error))
    assert main.run(["generate"]) == code
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line] == lines
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--log-level", "debug", "generate"], ["generate", "--log-level", "debug"]])
def test_debug_shows_the_traceback(command, capsys, arguments: list[str]) -> None:
    command(raising(ConfigError("wrong", "do this")))
    assert main.run(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: wrong\nhint: do this\n")


def test_success_is_zero(command, capsys) -> None:
    command(lambda: click.echo("done"))
    assert main.run(["generate"]) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_a_planned_option_is_refused_and_a_near_one_named(command, capsys) -> None:
    command(lambda: None)
    assert main.run(["generate", "--enable-lora"]) == 2
    assert capsys.readouterr().err.startswith("error: --enable-lora is planned: LoRA adapters\nhint: ")
    assert main.run(["generate", "--log-levle", "info"]) == 2
    assert "--log-level" in capsys.readouterr().err.splitlines()[0]


def test_what_only_refuses_itself_is_not_named_as_near(capsys) -> None:
    assert main.run(["generate", "--max-lenght", "5"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert "--max-length" in first and "--draft-max-length" not in first


def test_a_command_may_be_fetched_again(command, capsys) -> None:
    command(lambda: None)
    assert [main.run(["generate"]), main.run(["generate"])] == [0, 0]
    assert capsys.readouterr().err == ""


def test_a_near_command_is_named(capsys) -> None:
    assert main.run(["generat"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: no such command: generat. Did you mean generate?"
    assert main.run(["xyzzy"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: no such command: xyzzy."


def test_without_a_command_the_help_goes_to_stderr(capsys) -> None:
    assert main.run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "warm-cache" in captured.err


def test_the_help_lists_every_command_with_its_line(capsys) -> None:
    assert main.run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, entry in commands.COMMANDS.items():
        assert f"{name} {entry.summary}" in text
    assert isinstance(commands.COMMANDS["generate"], CommandEntry)


def test_the_version(capsys) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"max {__version__}\n"


def start(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=60)


def test_the_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, atexit; from max.cli.main import main\n"
        "heavy = ('jax', 'pydantic', 'yaml', 'numpy', 'tokenizers', 'fastapi', 'flax')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "main(['--help'])"
    )
    done = start(script, tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = (
        "import sys, types, click; from max.cli.main import main\n"
        "module = types.ModuleType('max.cli.generate'); sys.modules['max.cli.generate'] = module\n"
        "def many():\n"
        "    for number in range(1000000): print(number)\n"
        "module.command = click.command('generate')(many); main(['generate'])"
    )
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    ) as process:
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 1


def test_an_interrupt_that_falls_into_a_callback_is_not_lost(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time, types, weakref, click; from max.cli.main import main\n"
        "module = types.ModuleType('max.cli.generate'); sys.modules['max.cli.generate'] = module\n"
        "class Thing: pass\n"
        "def interrupt(reference): signal.raise_signal(signal.SIGINT)\n"
        "def work():\n"
        "    thing = Thing(); kept = weakref.ref(thing, interrupt); del thing; print('still here', flush=True)\n"
        "    time.sleep(50)\n"
        "module.command = click.command('generate')(work); main(['generate'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True, timeout=40)
    assert (done.stdout, done.stderr.strip(), done.returncode) == ("still here\n", "", 130)


def test_python_m_max_is_the_same_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "max", "--version"], cwd=tmp_path, text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == f"max {__version__}\n"
