"""What people see: a progress bar and a summary on stderr, one JSON object on stdout when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

ProgressCallback = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the group, as every command sees them."""

    verbose: int = 0
    quiet: bool = False


@contextlib.contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """A callback that draws one bar per stage on stderr; nothing where stderr is no terminal, or with -q."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if current_settings().quiet or not console.is_terminal:
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


@contextlib.contextmanager
def show_training() -> Iterator[Callable[[Any], None]]:
    """A callback for `TrainEvent`: a table on stderr that stays current, or plain lines where that is no terminal."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if current_settings().quiet:
        yield lambda event: None
    elif not console.is_terminal:
        yield _log_training()
    else:
        rows: dict[str, Any] = {}
        with Live(console=console, auto_refresh=False) as live:

            def show(event: Any) -> None:
                if event.message:
                    live.console.print(event.message, markup=False, highlight=False)
                if event.steps:
                    rows[event.stage] = event
                    live.update(_training_table(rows), refresh=True)

            yield show


def _log_training(interval_s: float = 10.0) -> Callable[[Any], None]:
    """Sentences at once; of steps the first and the last of a stage, and else one in so many seconds."""
    told: dict[str, float] = {}

    def show(event: Any) -> None:
        if event.message:
            click.echo(event.message, err=True)
        now = time.monotonic()
        if event.steps and (now - told.get(event.stage, -interval_s) >= interval_s or event.step >= event.steps):
            told[event.stage] = now
            click.echo(f"{event.stage} " + ", ".join(cell for cell in _training_columns(event) if cell), err=True)

    return show


def _training_table(rows: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("stage", "step", "images/s", "time left", "losses")
    for stage, event in rows.items():
        step, speed, left, losses = _training_columns(event)
        table.add_row(stage, step, speed.removesuffix(" images/s"), left.removesuffix(" left"), losses)
    return table


def _training_columns(event: Any) -> tuple[str, str, str, str]:
    """Step, speed, time left and losses of an event in words; '' for what is not known."""
    values = dict(event.values)
    speed = values.pop("images_a_second", 0.0)
    for key in ("seconds_a_step", "lr"):
        values.pop(key, None)
    left = "" if event.seconds_left is None else f"{timedelta(seconds=round(event.seconds_left))} left"
    return (
        f"{event.step}/{event.steps}",
        f"{speed:.1f} images/s" if speed else "",
        left if event.step < event.steps else "",
        " ".join(f"{key} {value:.3g}" for key, value in values.items()),
    )


def print_summary(summary: Any, *, as_json: bool = False) -> None:
    """Tell what was done: a line (and a line per note) on stderr, or the whole summary as JSON on stdout."""
    fields = dataclasses.asdict(summary)
    if as_json:
        click.echo(json.dumps(fields, default=_to_json))
        return
    if current_settings().quiet:
        return
    for note in fields.pop("notes", []):
        click.echo(f"note: {note}", err=True)
    if not fields.get("fps", True):  # a picture has none
        del fields["fps"]
    click.echo(", ".join(f"{key} {_format_value(value)}" for key, value in fields.items()), err=True)


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stderr, also with -q."""
    for line in lines:
        click.echo(line, err=True)


def current_settings() -> Settings:
    """The group's options; the defaults where no command is running."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Settings) if context else None
    return found or Settings()


def _format_value(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(v, float) for v in value.values()):
        return " ".join(f"{key} {v:.3g}" for key, v in value.items())
    if isinstance(value, (list, tuple)) and (not value or isinstance(value[0], (dict, Path, str))):
        return str(len(value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, (Path, Fraction)):
        return str(value)
    return value.item() if hasattr(value, "item") else str(value)
