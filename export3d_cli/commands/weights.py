"""`export3d weights list|download|verify|info|push`: what is there, from where, is it whole, under which licence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, options


@click.group()
def weights() -> None:
    """See, fetch, check and share weights.

    NAME is one of `weights list`, a file, or hf:OWNER/REPO[@REVISION][:FILE] on the Hugging Face hub.
    """


@weights.command("list")
@options.json_option
def list_(as_json: bool) -> None:
    """Name, size, licence and origin of every embedded file."""
    from export3d_cli import core

    entries = core.weights_manifest().values()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return
    for entry in entries:
        click.echo(f"{entry.name}  {entry.size / 1e6:.1f} MB  {entry.licence}\n  {entry.what}\n  from {entry.source}")


@weights.command()
@click.argument("names", nargs=-1, metavar="NAME...", required=True)
@click.option("--force", is_flag=True, help="Fetch again what is cached.")
@options.json_option
def download(names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Fetch weights into the cache (HF_HOME), to be used offline afterwards."""
    from export3d_cli import core

    for name in names:
        path = core.resolve_weights(name, force=force)
        _print_info(core.weights_info(path), ("path", "size", "revision", "sha256"), as_json)


@weights.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Compare files with the sha256 of the manifest; all of them when no NAME is given."""
    from export3d_cli import core

    entries = core.weights_manifest()
    for name in names or tuple(entries):
        if name not in entries:
            raise click.BadParameter(f"{name!r} is not listed; choose from {', '.join(entries)}")
        core.verify_weights(entries[name])
        click.echo(f"{name}: as listed")


@weights.command()
@click.argument("name", required=False)
@options.json_option
def info(name: str | None, as_json: bool) -> None:
    """Size, licence, parameter count, configuration and training record, from the header of the file."""
    from export3d_cli import core

    about = core.weights_info(name)
    _print_info(about, tuple(field.name for field in dataclasses.fields(about)), as_json)


@weights.command()
@click.argument("file", type=options.EXISTING_FILE)
@click.argument("target", metavar="hf:OWNER/REPO[@BRANCH][:FILE]")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Print the model card and upload nothing.")
def push(file: Path, target: str, private: bool, dry_run: bool) -> None:
    """Upload a weights FILE and, where the repository has none, a model card; needs HF_TOKEN or `hf auth login`."""
    from export3d_cli import core

    if not target.startswith("hf:"):
        raise click.BadParameter(f"{target!r} is not of the form hf:OWNER/REPO[@BRANCH][:FILE]")
    if dry_run:
        click.echo(core.weights_card(core.weights_info(file), target), nl=False)
        return
    address = core.upload_weights(file, target, private=private)
    if not console.current_settings().quiet:
        click.echo(address)


def _print_info(about: Any, fields: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        console.print_summary(about, as_json=True)
        return
    for key in fields:
        value = getattr(about, key)
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, part in value.items():
                click.echo(f"  {name}: {json.dumps(part)}")
        elif value not in (None, ""):
            click.echo(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
