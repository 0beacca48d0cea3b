"""`export3d sign FILE`: add signed content credentials."""

from pathlib import Path

import click

from export3d_cli import core, options


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=options.EXISTING_FILE)
@click.option("--certificate", type=options.EXISTING_FILE,
              help="Your certificate and its issuers', PEM.  [default: a new, self-signed one]")  # fmt: skip
@click.option("--key", type=options.EXISTING_FILE, help="Its private key, PEM without a password.")
def sign(files: tuple[Path, ...], certificate: Path | None, key: Path | None) -> None:
    """Add C2PA content credentials to each FILE, in place: a signed statement that it is synthetic.

    Needs export3d-cli[c2pa]. Sign last: any change of the file breaks the signature. A self-signed certificate is
    valid, but readers do not trust it.
    """
    for file in files:
        core.sign_file(file, certificate, key)
        click.echo(f"signed {file}")
