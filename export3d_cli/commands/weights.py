"""`export3d weights list|download|info|push`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.group()
def weights() -> None:
    """List, download, inspect and upload weights.

    NAME is a name from `weights list`, a file, or hf:OWNER/REPO[@REVISION][:FILE] on the Hugging Face Hub.
    """


@weights.command("list")
@options.json_option
def list_(as_json: bool) -> None:
    """List name, size, licence and origin of the bundled files."""
    entries = core.weights_manifest().values()
    if as_json:
        console.print_json(list(entries))
        return
    for entry in entries:
        click.echo(f"{entry.name}  {entry.size / 1e6:.1f} MB  {entry.licence}\n  {entry.what}\n  from {entry.source}")


@weights.command()
@click.argument("names", nargs=-1, metavar="NAME...", required=True)
@click.option("--force", is_flag=True, help="Download again even if the file is cached.")
@options.json_option
def download(names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Download weights to the cache (HF_HOME) for offline use."""
    for name in names:
        path = core.resolve_weights(name, force=force)
        _print_info(core.weights_info(path), ("path", "size", "revision", "sha256"), as_json)


@weights.command()
@click.argument("name", required=False)
@options.json_option
def info(name: str | None, as_json: bool) -> None:
    """Print size, licence, parameter count, configuration and training record of a weights file."""
    summary = core.weights_info(name)
    _print_info(summary, tuple(field.name for field in dataclasses.fields(summary)), as_json)


@weights.command()
@click.argument("file", type=options.EXISTING_FILE)
@click.argument("target", metavar="hf:OWNER/REPO[@BRANCH][:FILE]")
@click.option("--private", is_flag=True, help="Create a new repository as private.")
@click.option("--dry-run", is_flag=True, help="Print the model card without uploading.")
def push(file: Path, target: str, private: bool, dry_run: bool) -> None:
    """Upload a weights FILE, and a model card if the repository has none. Needs HF_TOKEN or `hf auth login`."""
    if not target.startswith("hf:"):
        raise click.BadParameter(f"{target!r} must have the form hf:OWNER/REPO[@BRANCH][:FILE]")
    if dry_run:
        click.echo(core.weights_card(core.weights_info(file), target), nl=False)
        return
    url = core.upload_weights(file, target, private=private)
    if not console.is_quiet():
        click.echo(url)


def _print_info(summary: Any, fields: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        console.print_json(summary)
        return
    for key in fields:
        value = getattr(summary, key)
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, entry in value.items():
                click.echo(f"  {name}: {json.dumps(entry)}")
        elif value not in (None, ""):
            click.echo(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
