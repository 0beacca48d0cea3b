"""`export3d doctor`: is everything there, and does it work?"""

from __future__ import annotations

import dataclasses
import json

import click

from export3d_cli import options


@click.command()
@click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", help="Look at these.  [default: the embedded ones]")
@options.json_option
@click.pass_context
def doctor(ctx: click.Context, weights: str | None, as_json: bool) -> None:
    """Check versions, devices, ffmpeg, weights and the face tracker: one line each, and what to do.

    Exit code 0 when all is well, else 1.
    """
    from export3d_cli import core

    findings = core.examine(weights)
    good = all(finding.ok for finding in findings)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"ok": good, "versions": core.versions(), "findings": rows}))
    else:
        for finding in findings:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("BAD ", fg="red", bold=True)
            click.echo(f"{mark} {finding.what}: {finding.found}" + (f" -> {finding.advice}" if finding.advice else ""))
    ctx.exit(0 if good else 1)
