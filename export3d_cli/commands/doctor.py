"""`export3d doctor`: check the installation."""

import click

from export3d_cli import console, core, options


@click.command()
@click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", help="Weights to check.  [default: embedded]")
@options.json_option
@click.pass_context
def doctor(ctx: click.Context, weights: str | None, as_json: bool) -> None:
    """Check versions, devices, ffmpeg, weights and the face tracker; print one line each and what to do on failure.

    Exit code 0 if all checks pass, else 1.
    """
    findings = core.examine(weights)
    all_passed = all(finding.ok for finding in findings)
    if as_json:
        console.print_json({"ok": all_passed, "versions": core.versions(), "findings": findings})
    else:
        for finding in findings:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("BAD ", fg="red", bold=True)
            click.echo(f"{mark} {finding.what}: {finding.found}" + (f" -> {finding.advice}" if finding.advice else ""))
    ctx.exit(0 if all_passed else 1)
