"""`export3d verify-mark FILE`: detect the marks of synthetic media."""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command("verify-mark")
@click.argument("file", type=options.EXISTING_FILE)
@options.json_option
@click.pass_context
def verify_mark(ctx: click.Context, file: Path, as_json: bool) -> None:
    """Search FILE for marks of this program: in the metadata, and in the picture (--watermark invisible).

    The exit code is 0 if a mark is found, else 1. A file without marks can still be synthetic.
    With export3d-cli[c2pa], content credentials are reported, too.
    """
    from export3d_cli import core

    marks = core.find_marks(file)
    if as_json:
        console.print_json(marks)
    else:
        metadata, invisible = ("found" if found else "none" for found in (marks.metadata, marks.invisible))
        click.echo(f"metadata: {metadata}")
        score = f"score {marks.score:.1f}, threshold {marks.threshold:.0f}, {marks.frames} frames"
        click.echo(f"invisible mark: {invisible} ({score})")
        if marks.credentials is not None:
            trust = "trusted signer" if marks.credentials.trusted else "signer not trusted"
            state = f"valid, {trust}" if marks.credentials.valid else "not valid: the file was changed"
            click.echo(f"content credentials: {state}, by {marks.credentials.generator or 'an unknown program'}")
    ctx.exit(0 if marks.found else 1)
