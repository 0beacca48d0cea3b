"""`export3d serve`: an HTTP API for other programs."""

import importlib.util
import re

import click

from export3d_cli import core, options


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="TCP port.")
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen at; 0.0.0.0 lets the whole network connect, without encryption.")  # fmt: skip
@click.option("--token", envvar="EXPORT3D_TOKEN", show_envvar=True,
              help="Secret of 16 or more characters that every request must "
              "carry.  [default: a random one, printed]")  # fmt: skip
@options.quality_option
@options.model_options
def serve(port: int, host: str, token: str | None) -> None:
    """Let other programs animate portraits by HTTP, as GET /openapi.json describes.

    POST /portraits takes a photo (?also=ID: use another one, too); POST /portraits/ID/videos a driver, such as a video
    or a sound, and /stills?control=smile=.7&yaw=20 none: both start a job. GET /jobs/ID gives its progress, GET
    /jobs/ID/result its file; DELETE ends it. Photos have at most 64 MiB, drivers 500 MiB, a job takes at most an hour.
    16 portraits and 8 jobs are kept, unused for 15 minutes.

    Needs `pip install 'export3d-cli[serve]'`. Ctrl-C ends it and deletes all files.
    """
    if not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")):
        raise core.InputError("the API needs FastAPI, which is not installed: run pip install 'export3d-cli[serve]'")
    if token is not None and not re.fullmatch("[!-~]{16,}", token):
        raise core.InputError("the token must have at least 16 characters, without spaces and accents: choose another")
    from export3d_cli.server import serve

    serve(options.load_animator(), host, port, token)
