"""`export3d verify-mark FILE`: was a video or picture made here?"""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command("verify-mark")
@click.argument("file", type=options.EXISTING_FILE)
@options.json_option
@click.pass_context
def verify_mark(ctx: click.Context, file: Path, as_json: bool) -> None:
    """Look in FILE for the marks that say it is synthetic: in the metadata, and in the picture (--watermark invisible).

    Exit code 0 when one is found, 1 when none is; that a file has none proves nothing.
    """
    from export3d_cli import core

    marks = core.find_marks(file)
    if as_json:
        console.print_summary(marks, as_json=True)
    else:
        click.echo(f"metadata: {_found_or_none(marks.metadata)}")
        score = f"score {marks.score:.1f}, {marks.threshold:.0f} or more is a find, {marks.frames} frames"
        click.echo(f"invisible mark: {_found_or_none(marks.invisible)} ({score})")
    ctx.exit(0 if marks.found else 1)


def _found_or_none(found: bool) -> str:
    return "found" if found else "none"
