"""`max`: finds the command, and turns every error into two lines and an exit code.

Exit codes: 0 done, 1 an error of ours, 2 a mistake in what was asked, 3 no room now, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from .. import Kind, MaxError, __version__
from .commands import COMMANDS
from .lazy_group import LazyGroup

_EXIT_CODES: dict[Kind, int] = {"internal": 1, "user": 2, "capacity": 3}
_INTERRUPTED = 130
_RESEND_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Only this package: the libraries below it log every step of theirs at debug.
_PACKAGE = __name__.partition(".")[0]
_LOGGER = logging.getLogger(_PACKAGE)
_LEVELS = ("debug", "info", "warning", "error")


class CommandLine(LazyGroup):
    """`max` itself: gives every command what all have."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        flags = {flag for parameter in command.params for flag in parameter.opts}
        if "--log-level" not in flags:
            command.params.append(_log_level_option())
        if self.table[cmd_name].takes_model:
            from .planned import planned_options

            command.params += planned_options(taken=flags)
        return command


def _log_level_option() -> click.Option:
    return click.Option(
        ["--log-level"],
        type=click.Choice(_LEVELS),
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, option, value: _set_log_level(value) if value else None,
        help="What to log on stderr [default: warning; for serve, info]; debug also shows the traceback of an error.",
    )


def _set_log_level(level: str) -> None:
    _LOGGER.setLevel(level.upper())


def _make_group() -> CommandLine:
    return CommandLine(
        table=COMMANDS,
        package=__package__ or "",
        name="max",
        params=[_log_level_option()],
        help="Compile and run language models on JAX/XLA, and keep what was compiled.",
        epilog="Every setting can also stand in a YAML file (--config-file) or in the environment (MAX_<NAME>).",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


group = click.version_option(__version__, prog_name="max", message="%(prog)s %(version)s")(_make_group())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (`sys.argv` by default) and exits with its code."""
    _open_streams()
    _keep_interrupts()
    _tidy_up_when_ended()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(run(arguments))


def _open_streams() -> None:
    """Makes stdout and stderr fit to be written to, whatever this process was started with.

    Where they are closed, a file of the cache could be opened in their place and take what libraries log. And an answer
    may hold characters that the encoding of stdout lacks.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _keep_interrupts() -> None:
    """Sends ^C again where it fell into a callback of the interpreter, as of a weak reference; exceptions end there."""
    report = sys.unraisablehook

    def resend(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        # Later, as this too would be dropped; and a true signal, as a system call may have begun by then.
        again = threading.Timer(_RESEND_S, os.kill, (os.getpid(), signal.SIGINT))
        try:
            again.start()
        except KeyboardInterrupt:  # on a busy machine it comes before the thread is known to have started
            resend(dropped)

    sys.unraisablehook = resend


def _tidy_up_when_ended() -> None:
    """Has SIGTERM and SIGHUP remove the temporary folders before they end the process as they would without this."""

    def end(number: int, _: object) -> None:
        # Not imported here: where nothing has imported it, there is no folder.
        if scratch := sys.modules.get(f"{_PACKAGE}.cache.scratch"):
            scratch.remove_all()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has one ignored
            signal.signal(number, end)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; every error has been reported on stderr by then."""
    try:
        code = group.main(arguments, prog_name="max", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as shown:
        click.echo(shown.ctx.get_help() if shown.ctx else shown.message, err=True)
        return _EXIT_CODES["user"]
    except click.ClickException as error:
        return _report(_shown(error), _usage_hint(error), _EXIT_CODES["user"])
    except MaxError as error:
        return _report(error.message, error.hint, _EXIT_CODES[error.kind])
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        return _drop_output()
    except OSError as error:
        if error.errno not in _FULL:
            return _report_fault(error)
        return _report(f"the output cannot be written: {error.strerror}", "Free some space there.", 3)
    except Exception as error:
        return _report_fault(error)


def _shown(error: click.ClickException) -> str:
    """What went wrong; options that only refuse themselves are none that an unknown one may have meant."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None and error.possibilities:
        options = [each for each in error.ctx.command.params if isinstance(each, click.Option) and each.hidden]
        hidden = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        near = [flag for flag in error.possibilities if flag not in hidden]
        error = click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx)
    return error.format_message()


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"`{context.command_path if context else 'max'} --help` shows what there is."


def _report(message: str, hint: str, code: int) -> int:
    if _LOGGER.isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {' '.join(hint.split())}", err=True)
    return code


def _report_fault(error: Exception) -> int:
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _report(f"internal error: {what}", "This is a fault of max; `--log-level debug` shows where.", 1)


def _drop_output() -> int:
    """Ends quietly when the reader of stdout has gone, as `head` does."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 1
