"""The HTTP API of `export3d serve` (FastAPI): a photo becomes a portrait; a driver, or the settings of a still, a job.

A request's body is one file, and its query has the settings. One job runs at a time, in the order of the requests.
Drivers and photos are deleted once they have been used, portraits and results `KEEP_S` after their last use.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import click
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field, PrivateAttr
from starlette.requests import ClientDisconnect

from export3d_cli import __version__, core
from export3d_cli.main import describe_error

MAX_PORTRAITS, MAX_JOBS, MAX_CONNECTIONS = 16, 8, 64  # jobs with their results
MAX_PHOTO_BYTES, MAX_DRIVER_BYTES = 64 << 20, 500 << 20
UPLOAD_TIMEOUT_S, JOB_TIMEOUT_S, KEEP_S, CLEAN_UP_INTERVAL_S = 120.0, 3600.0, 900.0, 10.0

Pixels = Annotated[int, Query(ge=0, le=2160, multiple_of=2, description="Longer side of the frames; 0: the photo's")]
Kind = Literal["mp4", "png", "npz", "csv"]
Scale = Annotated[float, Query(ge=0, le=10)]
Seconds = Annotated[float, Query(gt=0, le=3600, description="Of the driver to use, at most")]
Background = Annotated[str, Query(pattern="^(source|#[0-9a-fA-F]{6})$")]
Degrees = Annotated[float | None, Query(ge=-90, le=90)]
Control = Annotated[str, Field(pattern=r"^[a-zA-Z-]{1,40}=-?[0-9]{0,9}[.]?[0-9]{1,9}$")]
Controls = Annotated[tuple[Control, ...], Query(description="NAME=VALUE as in `edit-basis --set`; repeatable")]
Ids = Annotated[tuple[str, ...], Query(description="Portraits of the person; their photos as frames show them")]
Text = Annotated[str, Query(max_length=4000, description="What the sound says, plain or SRT, for exact lips")]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
FILE = {"schema": {"type": "string", "format": "binary"}}
BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": FILE}}}


class Problem(BaseModel):
    """Why a request is refused, in one line."""

    detail: str


class Kept(BaseModel):
    """A portrait or a job."""

    id: str = Field(default_factory=lambda: secrets.token_hex(8))
    _used: float = PrivateAttr(default_factory=time.monotonic)  # time of its last use


class Portrait(Kept):
    """An encoded photo."""

    _encoded: Any = None


class Job(Kept):
    """A job: `done` of `total` frames of a stage, null if their number is unknown."""

    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    stage: str = ""
    done: int = 0
    total: int | None = None
    error: str | None = None
    notes: list[str] = []
    _deleted: bool = False


class Service:
    """What the requests do; all methods but `_run` are called in the event loop's thread."""

    def __init__(self, animator: Any, token: str, folder: Path) -> None:
        self._animator, self._token, self._folder = animator, token.encode(), folder
        self._kept: dict[str, Kept] = {}
        self._pool, self._encoding = ThreadPoolExecutor(1), asyncio.Lock()

    def check_token(self, credentials: Credentials) -> None:
        """Refuse a request without the token."""
        if not (credentials and secrets.compare_digest(credentials.credentials.encode(), self._token)):
            raise HTTPException(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def add_portrait(self, request: Request, face: str = "largest", framing: Literal["photo", "face"] = "photo",
                           size: Pixels = 0, also: Ids = (), force: bool = False) -> Portrait:  # fmt: skip
        """Encode the photo, or the person file, in the body, together with the photos of other portraits.

        With `force`, they are used even if they seem to show somebody else.
        """
        others = {f"portrait {key}": self._find(Portrait, key)._encoded for key in also}
        for name, other in others.items():
            if other.person is not None:
                raise HTTPException(422, f"{name} is a person file, which stands for the main photo alone")
        photos = {name: other.canvas.photo for name, other in others.items()}

        def encode(path: Path) -> Any:
            photo = core.read_portrait(path)
            return self._animator.portrait(photo, face=face, framing=framing, size=size, also=photos, force=force)

        portrait = self._add(Portrait(), MAX_PORTRAITS)
        async with self._receive(portrait, request, "photo", MAX_PHOTO_BYTES) as path, self._encoding:
            portrait._encoded = await asyncio.to_thread(encode, path)
            path.unlink()
        return portrait

    async def add_video(self, request: Request, portrait: str, kind: Kind = "mp4", duration: Seconds = 600,
                        expression_scale: Scale = 1, pose_scale: Scale = 1, background: Background = "source",
                        control: Controls = (), drive_by: Literal["auto", "sound"] = "auto",
                        text: Text = "") -> Job:  # fmt: skip
        """Animate a portrait by the driver in the body, as `export3d reenact` does, into an MP4 file.

        `kind`: `mp4` stands for a video or sound of any format, `png` for a picture, `npz` for a motion file, `csv` for
        ARKit's.
        """
        encoded = self._find(Portrait, portrait)._encoded
        options = core.ReenactOptions(duration=duration, expression_scale=expression_scale, pose_scale=pose_scale,
                                      background=background, expression=_parse_controls(control),
                                      drive_by=drive_by)  # fmt: skip
        job = self._add(Job(), MAX_JOBS)
        async with self._receive(job, request, f"driver.{kind}", MAX_DRIVER_BYTES) as driver:
            if text:
                options = dataclasses.replace(options, text=driver.with_suffix(".txt"))
                driver.with_suffix(".txt").write_text(text, encoding="utf-8")
            out = self._folder / f"{job.id}-out.mp4"
            self._pool.submit(self._run, job, core.reenact, encoded, driver, out, options)
        return job

    async def add_still(self, portrait: str, yaw: Degrees = None, pitch: Degrees = None,
                        control: Controls = ()) -> Job:  # fmt: skip
        """Show a portrait with an expression into a PNG file, from an angle as `export3d novel-view` or the photo's."""
        encoded, expression = self._find(Portrait, portrait)._encoded, _parse_controls(control)
        make, options = core.edit_basis, core.EditOptions(frames=1, expression=expression)
        if yaw is not None or pitch is not None:
            angles = {"yaw": (yaw or 0, yaw or 0), "pitch": (pitch or 0, pitch or 0)}
            make, options = core.novel_view, core.NovelViewOptions(frames=1, expression=expression, **angles)
        job = self._add(Job(), MAX_JOBS)
        self._pool.submit(self._run, job, make, encoded, self._folder / f"{job.id}-out.png", options)
        return job

    async def get_job(self, job: str) -> Job:
        """Return the progress of a job."""
        return self._find(Job, job)

    async def get_result(self, job: str) -> FileResponse:
        """Return the file that a job has made."""
        found = self._find(Job, job)
        if found.state != "done":
            raise HTTPException(409, found.error or f"the job is {found.state}: wait until it is done")
        return FileResponse(next(self._folder.glob(f"{found.id}-out.*")))

    async def delete(self, id: str) -> None:
        """Delete a portrait, whose jobs go on, or stop a job and delete its files."""
        self._delete(self._find(Kept, id))

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Delete what is no longer used, now and then, and everything at the end."""

        async def clean_up() -> None:
            while True:
                await asyncio.sleep(CLEAN_UP_INTERVAL_S)
                for item in list(self._kept.values()):
                    is_active = getattr(item, "state", "done") in ("waiting", "running")
                    if not is_active and time.monotonic() - item._used > KEEP_S:
                        self._delete(item)

        task = asyncio.create_task(clean_up())
        yield
        task.cancel()
        for item in list(self._kept.values()):
            self._delete(item)
        self._pool.shutdown()

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Answer a request that failed by `error`."""
        if isinstance(error, RequestValidationError):
            error = core.InputError("{loc[1]}: {msg}, got {input!r}".format(**error.errors()[0]))
        return JSONResponse({"detail": self._describe(error)}, 422 if isinstance(error, core.Export3DError) else 500)

    def _add(self, item: Any, limit: int) -> Any:
        if sum(type(other) is type(item) for other in self._kept.values()) >= limit:
            raise HTTPException(429, f"there are {limit} {type(item).__name__.lower()}s: delete one, or wait")
        self._kept[item.id] = item
        return item

    def _find(self, kind: type[Kept], key: str) -> Any:
        item = self._kept.get(key)
        if not isinstance(item, kind):
            raise HTTPException(404, f"{key[:40]!r} does not exist or was deleted: send the file again")
        item._used = time.monotonic()
        return item

    def _delete(self, item: Kept) -> None:
        self._kept.pop(item.id, None)
        if isinstance(item, Job):
            item._deleted = True
            if item.state == "running":  # its thread deletes its files
                return
        for path in self._folder.glob(f"{item.id}-*"):
            path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _receive(self, item: Kept, request: Request, name: str, limit: int) -> AsyncIterator[Path]:
        """Write a request's body into a file of a new portrait or job, which is deleted if that or the block fails."""
        path = self._folder / f"{item.id}-{name}"

        async def copy() -> None:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    if file.tell() + len(chunk) > limit:
                        raise HTTPException(413, f"the body has more than {limit >> 20} MiB: send a smaller file")
                    file.write(chunk)

        try:
            await asyncio.wait_for(copy(), UPLOAD_TIMEOUT_S)
            yield path
        except BaseException as error:
            self._delete(item)
            if isinstance(error, (asyncio.TimeoutError, ClientDisconnect)):
                raise HTTPException(408, "the body did not come in time: send a smaller file") from error
            raise

    def _run(self, job: Job, make: Callable[..., Any], *arguments: Any) -> None:
        deadline = time.monotonic() + JOB_TIMEOUT_S

        def report(stage: str, done: int, total: int | None) -> None:
            if job._deleted or time.monotonic() > deadline:
                raise core.Export3DError(f"the job took more than {JOB_TIMEOUT_S:.0f} s: use a shorter driver")
            job.state, job.stage, job.done, job.total = "running", stage, done, total

        try:
            report("start", 0, None)
            job.notes = list(make(self._animator, *arguments, progress=report).notes)
        except Exception as error:  # of this job alone
            job.error = self._describe(error)
        for path in self._folder.glob(f"{job.id}-driver.*"):
            path.unlink(missing_ok=True)
        job._used, job.state = time.monotonic(), "failed" if job.error else "done"
        if job._deleted:
            self._delete(job)

    def _describe(self, error: Exception) -> str:
        """Return one line about an error, with names instead of paths of files here; a defect is logged."""
        if line := describe_error(error):
            return re.sub(re.escape(f"{self._folder}/") + "[0-9a-f]+-", "", line)
        logging.getLogger("uvicorn.error").error("internal error", exc_info=error)
        return "internal error: the output of the program shows where"


def _parse_controls(texts: tuple[str, ...]) -> Any:
    return core.ExpressionEdit({name: float(value) for name, _, value in (text.partition("=") for text in texts)})


def build(animator: Any, token: str, folder: Path) -> FastAPI:
    """Return the application; `folder` takes its files."""
    service = Service(animator, token, folder)
    app = FastAPI(
        title="export3d", version=__version__, dependencies=[Depends(service.check_token)], lifespan=service.lifespan,
        responses={code: {"model": Problem} for code in (401, 404, 408, 409, 413, 422, 429, 500)},
        exception_handlers=dict.fromkeys((RequestValidationError, core.Export3DError, Exception), service.refuse),
        docs_url=None, redoc_url=None,  # pages with scripts of another site
    )  # fmt: skip
    app.post("/portraits", status_code=201, openapi_extra=BODY)(service.add_portrait)
    app.delete("/portraits/{id}", status_code=204)(service.delete)
    app.post("/portraits/{portrait}/videos", status_code=202, openapi_extra=BODY)(service.add_video)
    app.post("/portraits/{portrait}/stills", status_code=202)(service.add_still)
    app.get("/jobs/{job}")(service.get_job)
    files = {"content": {"video/mp4": FILE, "image/png": FILE}}
    app.get("/jobs/{job}/result", response_class=FileResponse, responses={200: files})(service.get_result)
    app.delete("/jobs/{id}", status_code=204)(service.delete)
    return app


def serve(animator: Any, host: str, port: int, token: str | None) -> None:
    """Print the address, answer requests until Ctrl-C, and delete all files; without a token, make and print one."""
    try:
        server = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise core.InputError(f"{host}:{port} cannot be opened ({error}): choose another --port or --host") from error
    secret = token or secrets.token_urlsafe(24)
    with server, TemporaryDirectory(prefix="export3d-serve-") as folder, contextlib.suppress(KeyboardInterrupt):
        shown = "your token" if token else f"the token {secret}"
        click.echo(f"Listening at {host}, port {port}, for requests with {shown}; Ctrl-C ends it.", err=True)
        uvicorn.Server(uvicorn.Config(build(animator, secret, Path(folder)), log_level="warning", server_header=False,
                                      limit_concurrency=MAX_CONNECTIONS,
                                      timeout_graceful_shutdown=5)).run(sockets=[server])  # fmt: skip
