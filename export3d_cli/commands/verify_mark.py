"""`export3d verify-mark FILE`: detect the marks of synthetic media."""

from pathlib import Path

import click

from export3d_cli import console, core, options


@click.command("verify-mark")
@click.argument("file", type=options.EXISTING_FILE)
@options.json_option
@click.pass_context
def verify_mark(ctx: click.Context, file: Path, as_json: bool) -> None:
    """Search FILE for marks of this program: in the metadata, and in the picture (--watermark invisible).

    The exit code is 0 if a mark is found, else 1. A file without marks can still be synthetic.
    With export3d-cli[c2pa], content credentials are reported, too.
    """
    marks = core.find_marks(file)
    if as_json:
        console.print_json(marks)
    else:
        metadata, invisible = ("found" if found else "none" for found in (marks.metadata, marks.invisible))
        click.echo(f"metadata: {metadata}")
        score = f"score {marks.score:.1f}, threshold {marks.threshold:.0f}, {marks.frames} frames"
        click.echo(f"invisible mark: {invisible} ({score})")
        if marks.credentials is not None:
            found = marks.credentials
            trust = "trusted signer" if found.trusted else "signer not trusted"
            content = "synthetic media" if found.synthetic else "media not said to be synthetic"
            state = f"{content} by {found.generator}, valid, {trust}" if found.valid else "not valid"
            click.echo(f"content credentials: {state}")
    ctx.exit(0 if marks.found else 1)
