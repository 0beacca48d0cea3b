"""Terminal output: progress bars and a summary on stderr, or one JSON object on stdout (--json)."""

import contextlib
import dataclasses
import faulthandler
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from export3d_cli.core.runtime.errors import Export3DWarning

T = TypeVar("T")
ProgressCallback = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)


def is_quiet() -> bool:
    """Return whether -q was given, before or after the command."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get("quiet"))


@contextlib.contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """Yield a callback that draws one bar per stage on stderr; it does nothing with -q or without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBars

    console = Console(stderr=True)
    if is_quiet() or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    rate_column = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn())
    with ProgressBars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            task = tasks[stage]
            speed = bars.tasks[task].speed
            expected = None if total is None else max(done, total)  # an estimate, for videos
            bars.update(task, completed=done, total=expected, rate=f"{speed:.1f}/s" if speed else "")

        yield report


def live_log(interval_s: float = 10.0) -> Callable[[str], None]:
    """Return a callback that prints lines: at once if the part before the comma changes, else every `interval_s`."""
    state, printed = "", 0.0

    def show(line: str) -> None:
        nonlocal state, printed
        new_state, now = line.partition(",")[0], time.monotonic()
        if new_state != state or now - printed >= interval_s:
            state, printed = new_state, now
            click.echo(line, err=True)

    return (lambda line: None) if is_quiet() else show


def training_log(interval_s: float = 10.0) -> Callable[[Any], None]:
    """Return a callback for `TrainEvent` that prints messages at once, and steps every `interval_s` and at the end."""
    last_printed: dict[str, float] = {}

    def show(event: Any) -> None:
        if event.message:
            click.echo(event.message, err=True)
        now = time.monotonic()
        is_due = now - last_printed.get(event.stage, -interval_s) >= interval_s
        if not event.steps or not (is_due or event.step >= event.steps):
            return
        last_printed[event.stage] = now
        values = dict(event.values)
        for key in ("seconds_a_step", "lr"):
            values.pop(key, None)
        cells = [f"{event.stage} {event.step}/{event.steps}"]
        if speed := values.pop("images_a_second", 0.0):
            cells.append(f"{speed:.1f} images/s")
        if event.seconds_left is not None and event.step < event.steps:
            cells.append(f"{timedelta(seconds=round(event.seconds_left))} left")
        cells.append(" ".join(f"{key} {value:.3g}" for key, value in values.items()))
        click.echo(", ".join(filter(None, cells)), err=True)

    return (lambda event: None) if is_quiet() else show


def print_summary(summary: Any, *, as_json: bool = False) -> None:
    """Print a summary: one line (and one per note) on stderr, or all fields as JSON on stdout."""
    if as_json:
        print_json(summary)
        return
    fields = dataclasses.asdict(summary)
    if is_quiet():
        return
    fields.pop("histogram", None)  # of a live session, many numbers
    for note in fields.pop("notes", []):
        click.echo(f"note: {note}", err=True)
    if not fields.get("fps", True):  # pictures have no frame rate
        del fields["fps"]
    click.echo(", ".join(f"{key} {_format_value(x)}" for key, x in fields.items() if x is not None), err=True)


def run(job: Callable[..., T], *arguments: Any, as_json: bool, **options: Any) -> T:
    """Call a job with a progress bar, print its summary, and return it."""
    with show_progress() as progress:
        summary = job(*arguments, progress=progress, **options)
    print_summary(summary, as_json=as_json)
    return summary


def print_json(value: Any) -> None:
    """Print a value that may contain dataclasses, paths, fractions and NumPy numbers as JSON on stdout."""
    click.echo(json.dumps(value, default=_to_json))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stderr, even with -q."""
    for line in lines:
        click.echo(line, err=True)


@contextlib.contextmanager
def show_warnings() -> Iterator[None]:
    """Print our own warnings as notes on stderr, and hide Pillow's (of damaged EXIF data)."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_note(message: Warning | str, category: type[Warning], *arguments: Any, **options: Any) -> None:
            if issubclass(category, Export3DWarning):
                click.echo(f"note: {message}", err=True)
            else:
                show(message, category, *arguments, **options)

        warnings.showwarning = show_note
        warnings.filterwarnings("always", category=Export3DWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextlib.contextmanager
def hide_library_messages() -> Iterator[None]:
    """Hide what native libraries (LiteRT, libtiff) print to file descriptor 2; `sys.stderr` continues to work.

    For a whole command, not for single calls: redirecting a descriptor affects all threads.
    """
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    stderr = sys.stderr
    with (
        open(os.devnull, "wb") as null,
        open(saved, "w", buffering=1, encoding=stderr.encoding, errors="backslashreplace") as visible,
    ):
        stderr.flush()
        os.dup2(null.fileno(), 2)
        is_descriptor_2 = stderr is sys.__stderr__
        if is_descriptor_2:  # not while a test captures it
            sys.stderr = visible
            faulthandler.enable(visible)  # a crash of a native library would leave no message at all
        try:
            yield
        finally:
            if is_descriptor_2:
                faulthandler.disable()
                sys.stderr = stderr
            visible.flush()
            os.dup2(saved, 2)


def _format_value(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(v, float) for v in value.values()):
        return " ".join(f"{key} {v:.3g}" for key, v in value.items())
    if isinstance(value, (list, tuple)) and (not value or isinstance(value[0], (dict, Path, str))):
        return str(len(value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.item() if hasattr(value, "item") else str(value)  # a NumPy number, a path or a fraction
