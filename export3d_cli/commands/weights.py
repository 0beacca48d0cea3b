"""`export3d weights list|verify`: what is there, from where, under which licence, and whether it is whole."""

from __future__ import annotations

import dataclasses
import json

import click

from export3d_cli import options


@click.group()
def weights() -> None:
    """See and check the embedded weights."""


@weights.command("list")
@options.json_option
def list_(as_json: bool) -> None:
    """Name, size, licence and origin of every embedded file."""
    from export3d_cli import core

    entries = core.manifest().values()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return
    for entry in entries:
        click.echo(f"{entry.name}  {entry.size / 1e6:.1f} MB  {entry.licence}\n  {entry.what}\n  from {entry.source}")


@weights.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Compare files with the sha256 of the manifest; all of them when no NAME is given."""
    from export3d_cli import core

    entries = core.manifest()
    for name in names or tuple(entries):
        if name not in entries:
            raise click.BadParameter(f"{name!r} is not listed; choose from {', '.join(entries)}")
        core.verify(entries[name])
        click.echo(f"{name}: as listed")
