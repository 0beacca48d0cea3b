"""`export3d app`: a page on this machine."""

import contextlib
import importlib.util
import threading

import click

from export3d_cli import core, options


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="TCP port of the page.")
@options.quality_option
@options.model_options
def app(port: int) -> None:
    """Open a page in which a photo is animated, turned and edited with sliders; only this machine can reach it.

    Needs `pip install 'export3d-cli[app]'`. Ctrl-C ends it and deletes all files of its pages.
    """
    if importlib.util.find_spec("gradio") is None:
        raise core.InputError("the page needs gradio, which is not installed: run pip install 'export3d-cli[app]'")
    from export3d_cli.app import serve

    with serve(options.load_animator(), port) as address, contextlib.suppress(KeyboardInterrupt):
        click.echo(f"Open {address} in a browser; Ctrl-C ends it.", err=True)
        threading.Event().wait()
