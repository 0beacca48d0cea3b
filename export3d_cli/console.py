"""What people see: a progress bar and a summary on stderr, one JSON object on stdout when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

Progress = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the group, as every command sees them."""

    verbose: int = 0
    quiet: bool = False


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A callback that draws one bar per stage on stderr; nothing where stderr is no terminal, or with -q."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if settings().quiet or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            task = tasks[stage]
            speed = bars.tasks[task].speed
            bars.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")

        yield report


def training(report: Progress, event: Any) -> None:
    """Show one `TrainEvent`: a sentence as a line, a step as progress of its stage."""
    if event.message and not settings().quiet:
        click.echo(event.message, err=True)
    if event.steps:
        report(event.stage, event.step, event.steps)


def finish(summary: Any, *, as_json: bool = False) -> None:
    """Tell what was done: a line (and a line per note) on stderr, or the whole summary as JSON on stdout."""
    fields = dataclasses.asdict(summary)
    if as_json:
        click.echo(json.dumps(fields, default=_plain))
        return
    if settings().quiet:
        return
    for note in fields.pop("notes", []):
        click.echo(f"note: {note}", err=True)
    click.echo(", ".join(f"{key} {_short(value)}" for key, value in fields.items()), err=True)


def tell(lines: Iterable[str]) -> None:
    """Lines on stderr, also with -q."""
    for line in lines:
        click.echo(line, err=True)


def settings() -> Settings:
    """The group's options; the defaults where no command is running."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Settings) if context else None
    return found or Settings()


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and (not value or isinstance(value[0], (dict, Path, str))):
        return str(len(value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (Path, Fraction)):
        return str(value)
    return value.item() if hasattr(value, "item") else str(value)
