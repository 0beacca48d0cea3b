"""The `export3d` command group. It imports subcommands lazily and turns errors into exit codes.

One line on stderr (-v adds the traceback) and an exit code: `Export3DError` (its own code), misuse reported by Click
(2), lack of memory, disk or open files (1). Ctrl-C exits with 130. Any other exception is a defect and keeps its
traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import signal
import sys
import threading
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from export3d_cli import core
from export3d_cli.console import hide_library_messages, show_warnings
from export3d_cli.core.runtime.errors import Export3DError, find_opencv_problem
from export3d_cli.examples import COMMANDS, OVERVIEW, add_examples
from export3d_cli.options import add_negations

MAX_MESSAGE_CHARS = 1600
VERBOSE_HELP, QUIET_HELP = "Show the traceback of an error.", "Show no progress bar and no summary."


class LazyGroup(click.Group):
    """A group that imports a subcommand's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command: `novel-view` is `commands.novel_view.novel_view`."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"export3d_cli.commands.{name}"), name)
        subcommands = command.commands if isinstance(command, click.Group) else {}
        for part, path in ((command, cmd_name), *((sub, f"{cmd_name} {key}") for key, sub in subcommands.items())):
            _add_global_options(part)
            add_negations(part)
            add_examples(part, path)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand and turn errors into exit codes."""
        try:
            hide = contextlib.nullcontext() if ctx.meta.get("verbose") else hide_library_messages()
            with hide, show_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _exit_interrupted(ctx)
        except Exception as error:
            if _InterruptHandler.received:  # Ctrl-C also ends ffmpeg, whose error may arrive first
                _exit_interrupted(ctx)
            line = describe_error(error)
            if not line:
                raise
            if ctx.meta.get("verbose"):
                import traceback

                traceback.print_exc()
            click.echo(f"error: {line}", err=True)
            ctx.exit(getattr(error, "exit_code", 1))


_RESOURCE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.EAGAIN, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
}  # fmt: skip
_OUT_OF_MEMORY = re.compile(
    r"(can't|cannot|failed to) (allocate|map)|out of memory|insufficient memory|could not create a primitive"
    r"|can't start new thread",
    re.IGNORECASE,
)


def describe_error(error: Exception) -> str:
    """Return one printable line, at most `MAX_MESSAGE_CHARS` long, about an error; '' for a defect."""
    reason = _reason(error)
    if len(reason) > MAX_MESSAGE_CHARS:  # libraries quote file contents; the remedy is at the end
        reason = f"{reason[: MAX_MESSAGE_CHARS // 2]} ... {reason[-400:]}"
    text = " ".join(reason.split())  # file names in it may contain any character
    return "".join(c if c.isprintable() else "?" for c in text)


def _reason(error: Exception) -> str:
    """Return problem and remedy of an error of the user, the machine or the installation; '' for a defect."""
    if isinstance(error, Export3DError):
        return str(error)
    if isinstance(error, click.UsageError) and error.ctx and type(error).__name__ != "NoArgsIsHelpError":
        return f"{error.format_message().rstrip('.')}: see `{error.ctx.command_path} --help`"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return "out of memory: close other programs, or try a smaller --batch, picture or video"
    if isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS:
        return f"the operating system reported: {error.strerror}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, (ImportError, AttributeError)) and (problem := find_opencv_problem()):
        return problem
    if isinstance(error, ImportError) and not (error.name or "").startswith("export3d_cli"):
        return f"{error.name or 'a library'} cannot be imported ({error}): run `export3d doctor`"
    return ""


def _print_versions(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        for name, version in core.versions().items():
            click.echo(f"{name} {version}")
        ctx.exit()


def _apply_global(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Store -v or -q, given before or after the command, where every context finds it."""
    assert option.name is not None
    if ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
        ctx.meta[option.name] = value
        if option.name == "quiet":
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = str(int(value))


def _add_global_options(command: click.Command) -> None:
    """Accept -v and -q before and after a command, where most people put them."""
    if any(option.name == "quiet" for option in command.params):  # a command that has been looked up before
        return
    for names, text in ((["-v", "--verbose"], VERBOSE_HELP), (["-q", "--quiet"], QUIET_HELP)):
        command.params.append(click.Option(names, is_flag=True, expose_value=False, callback=_apply_global, help=text))


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions,
              help="Show the versions of export3d, Python, torch, CUDA and ffmpeg.")  # fmt: skip
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Animate a portrait from one photo and a driving video, turn it, edit its expression, train the model."""
    if ctx.invoked_subcommand is None:
        click.echo(OVERVIEW, nl=False)


_add_global_options(cli)


class _InterruptHandler:
    """SIGINT handler that records that Ctrl-C was pressed."""

    received = False

    @classmethod
    def handle(cls, *_: object) -> None:
        cls.received = True
        raise KeyboardInterrupt


def _reraise_dropped_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C to the main thread again, if Python dropped it because it occurred in a finalizer (`__del__`)."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif hasattr(signal, "pthread_kill"):  # not on Windows
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.daemon = True
        timer.start()


def _exit_interrupted(ctx: click.Context) -> NoReturn:
    click.echo("interrupted", err=True)
    ctx.exit(130)


def main() -> None:
    """Run the program; SIGTERM unwinds the stack so that temporary files and ffmpeg processes are cleaned up."""
    # PyTorch's OpenMP threads wait for work in a loop by default, on cores that other programs could use; asleep they
    # cost a wake-up per operation. OpenMP reads the variable when torch is imported, and so do worker processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore it
        signal.signal(signal.SIGINT, _InterruptHandler.handle)
        sys.unraisablehook = _reraise_dropped_interrupt
    cli(prog_name="export3d")
