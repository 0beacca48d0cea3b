"""The page of `export3d app` (Gradio): a photo, a driver, sliders with a preview, and the command of each result.

Each browser tab is a session with a folder of its own; its files are deleted when the tab is closed, and all files when
the program ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import gradio as gr
import safehttpx
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import load_photo
from export3d_cli.core.animation.edit_basis import EditOptions, describe_basis, edit_basis
from export3d_cli.core.animation.expression_controls import CONTROLS, ExpressionEdit
from export3d_cli.core.animation.novel_view import NovelViewOptions, novel_view
from export3d_cli.core.animation.options import PortraitOptions, ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.runtime.errors import Export3DError, InputError
from export3d_cli.core.runtime.weights import example_path

PREVIEW_SIZE_PX = 512  # longer side of preview frames
MAX_UPLOAD = "500mb"
BASIS_RANGE = 6.0  # slider range of basis coefficients: 98 % of filmed values lie within it
SHOWN_CONTROLS = ("smile", "jaw", "pucker", "blink", "eyes-open", "brows", "gaze-x", "gaze-y")
CSS = """footer {display: none} .gradio-container {width: 100%; max-width: 72rem !important; margin: 0 auto !important}
#driver video {height: 276px} input[type=range]:focus-visible {outline: 2px solid; outline-offset: 4px}"""


@dataclass
class Session:
    """One open page."""

    folder: Path  # for its results
    uploads: set[Path] = field(default_factory=set)  # files that the browser sent
    photo: Path | None = None
    also: tuple[Path, ...] = ()  # more photos of the person
    force: bool = False  # use them even if they seem to show somebody else
    portrait: Portrait | None = None
    edit: tuple[float, ...] = ()  # the newest values of the sliders of expressions
    cancelled: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serve(animator: Animator, port: int) -> Iterator[str]:
    """Serve the page on this machine only, and yield its address; delete all files at the end."""
    with tempfile.TemporaryDirectory(prefix="export3d-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads
        jobs = _Jobs(animator, Path(folder))
        page = build(jobs)
        jobs.examples = set(Path(folder).rglob("*"))
        safehttpx.get = safehttpx.async_validate_url = _refuse_address
        theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        try:
            _, address, _ = page.launch(server_name="127.0.0.1", server_port=port, share=False,
                                        prevent_thread_lock=True, quiet=True, max_file_size=MAX_UPLOAD, ssr_mode=False,
                                        theme=theme, css=CSS, footer_links=[],
                                        app_kwargs={"middleware": [Middleware(_OwnPage)]})  # fmt: skip
        except OSError as error:
            raise InputError(f"port {port} is in use: choose another one with --port") from error
        except ValueError as error:  # it does not answer
            raise InputError(f"no connection to 127.0.0.1:{port}: check the proxy settings and try again") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


async def _refuse_address(*_: object, **__: object) -> None:
    """Take the place of Gradio's requests to addresses that are sent in place of files."""
    raise gr.Error("Give a file, not an address.", print_exception=False)


class _OwnPage:
    """Middleware that refuses the requests of other sites' pages; loopback has only local names."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http":
            host, origin = (Headers(scope=scope).get(name) for name in ("host", "origin"))
            if str(host).partition(":")[0] not in ("127.0.0.1", "localhost") or origin not in (None, f"http://{host}"):
                app = PlainTextResponse("Open the page by its own address.", 403)
        await app(scope, receive, send)


def build(jobs: _Jobs) -> gr.Blocks:
    """Lay out the page."""
    names = [f"v{v.v}: {', '.join(list(v.moved_by)[:2])}" for v in describe_basis(jobs.animator)]
    photo_example, driver_example = str(example_path("source.jpg")), str(example_path("drive.mp4"))

    def number(low: float, high: float, value: float, label: str, step: float = 0.1) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=label, min_width=220)

    def command_line() -> gr.Code:
        command = "export3d reenact source.jpg drive.mp4 -o out.mp4"
        return gr.Code(command, label="The same on the command line", lines=1, interactive=False, wrap_lines=True)

    with gr.Blocks(title="export3d", analytics_enabled=False) as page:
        gr.Markdown("# export3d\n\nAnimate only people who agree to it. Every result is marked as synthetic.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(photo_example, label="Photo with one large face", type="filepath",
                                 sources=["upload", "webcam"], height=380, alt_text="The photo")  # fmt: skip
                photo.preprocess = lambda data: data and data.path  # Pillow's errors and conversions are left out
                person = gr.File(label="Or a person file, in place of the photo", file_types=[".safetensors"],
                                 height=140)  # fmt: skip
                with gr.Accordion("More photos of the person", open=False):
                    also = gr.File(label="For own teeth, shut eyes, the far cheek", file_count="multiple",
                                   type="filepath", file_types=["image"], height=140)  # fmt: skip
                    force = gr.Checkbox(label="Use them even if they seem to show somebody else")
            with gr.Column(), gr.Tabs():
                with gr.Tab("Animate"):
                    driver = gr.Video(driver_example, label="Video of the face that moves it", elem_id="driver",
                                      sources=["upload", "webcam"], include_audio=True, height=320)  # fmt: skip
                    with gr.Accordion("Speech instead of a video", open=False):
                        sound = gr.Audio(label="Sound whose words the lips speak, in place of the video",
                                         type="filepath")  # fmt: skip
                        text = gr.Textbox(label="What it says, for exact lips (not needed)", lines=2, max_length=20_000)
                    with gr.Accordion("Options", open=False):
                        expression = number(0, 3, 1, "Strength of the expression")
                        pose = number(0, 3, 1, "Strength of the head's movement")
                        seconds = number(1, 600, 600, "Seconds of the video or sound to use, at most", 1)
                        framing = gr.Radio(["photo", "face"], value="photo", label="Show the whole photo or the face")
                        mark = gr.Radio(
                            ["none", "visible", "invisible"], value="invisible", label="Mark in the picture"
                        )
                    with gr.Row():
                        render = gr.Button("Render", variant="primary")
                        cancel = gr.Button("Cancel")
                    result = gr.Video(label="Result", interactive=False, buttons=["download"])
                    reenact_command = command_line()
                    made = gr.Gallery(label="The last videos of this page", columns=3, height=260, interactive=False)
                with gr.Tab("Turn"):
                    turn_inputs = [
                        number(-40, 40, 0, "Yaw in degrees; + turns the head to the image's right", 1),
                        number(-30, 30, 0, "Pitch in degrees; + is up", 1),
                    ]
                    turned, turn_command = _preview(), command_line()
                with gr.Tab("Expression"):
                    edited, edit_command = _preview(), command_line()
                    reset = gr.Button("Reset")
                    with gr.Row():  # two columns where there is room
                        edit_inputs = [number(-1 if CONTROLS[c].lowered else 0, 1, 0, c, 0.05) for c in SHOWN_CONTROLS]
                    with gr.Accordion("Directions of the expression basis", open=False), gr.Row():
                        edit_inputs += [number(-BASIS_RANGE, BASIS_RANGE, 0, name) for name in names]

        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        turn, edit = (jobs.turn, [turned, turn_command]), (jobs.edit, [edited, edit_command])
        first, _ = [
            gr.on([slider.change for slider in inputs], run, inputs, outputs, show_progress="minimal",
                  trigger_mode="always_last", concurrency_id="preview", api_visibility="private")
            for inputs, (run, outputs) in ((edit_inputs, edit), (turn_inputs, turn))
        ]  # fmt: skip
        first.success(jobs.adapt_edit, edit_inputs, edit[1], trigger_mode="always_last", **hidden)
        photos = [photo, person, also, force]
        changes = [page.load, *(element.change for element in photos)]
        encode = gr.on(changes, jobs.set_photo, photos, None, trigger_mode="always_last", **hidden)
        shown = encode.success(turn[0], turn_inputs, turn[1], **hidden).success(edit[0], edit_inputs, edit[1], **hidden)
        shown.success(jobs.adapt_edit, edit_inputs, edit[1], **hidden)
        reset.click(lambda: [0] * len(edit_inputs), None, edit_inputs, **hidden)
        render.click(jobs.reenact, [*photos, driver, sound, text, expression, pose, seconds, framing, mark],
                     [result, reenact_command, made], show_progress_on=[result], concurrency_id="render",
                     api_visibility="private")  # fmt: skip
        cancel.click(jobs.cancel, queue=False, **hidden)
        page.unload(jobs.close)
    return page


def _preview() -> gr.Image:
    return gr.Image(label="Preview", type="filepath", interactive=False, height=380, buttons=["download"])


class _Jobs:
    """What the page's elements do, for all open pages; Gradio identifies them by `session_hash`."""

    def __init__(self, animator: Animator, folder: Path) -> None:
        self.animator, self._folder = animator, folder
        self.examples: set[Path] = set()  # files that all pages share
        self._sessions: dict[str, Session] = {}
        self._numbers = itertools.count(1)

    def close(self, request: gr.Request) -> None:
        """Stop the page's job and delete its files."""
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.cancelled.set()
            shutil.rmtree(session.folder, ignore_errors=True)
            for path in session.uploads.difference(self.examples, *(s.uploads for s in self._sessions.values())):
                path.unlink(missing_ok=True)

    def set_photo(self, photo: str | None, person: str | None, also: list[str] | None, force: bool,
                  request: gr.Request) -> None:  # fmt: skip
        """Encode a new photo, or the person file in its place, together with more photos of the person."""
        session, photo = self._session(request), person or photo
        session.photo, session.portrait = Path(photo) if photo else None, None
        session.also, session.force = tuple(map(Path, also or ())), force
        session.uploads |= {*session.also, *([session.photo] if session.photo else [])}
        if session.photo is not None:
            options = PortraitOptions(also=session.also, force=force)
            with self._show_errors():
                session.portrait = load_photo(self.animator, session.photo, options, max_side=PREVIEW_SIZE_PX)

    def turn(self, yaw: float, pitch: float, request: gr.Request) -> tuple[str | None, str]:
        """Show the photo from another angle, and return the command for it."""
        view = NovelViewOptions(yaw=(yaw, yaw), pitch=(pitch, pitch), frames=1)
        arguments = [f"--yaw={yaw:g}", f"--pitch={pitch:g}", "-o", "view.png"]
        frame = self._show(request, lambda portrait, out: novel_view(self.animator, portrait, out, view))
        return frame, self._command(request, "novel-view", arguments)

    def edit(self, request: gr.Request, *values: float) -> tuple[Any, Any]:
        """Show the photo with another expression, by controls and basis, at once; return the command for it."""
        self._session(request).edit = values
        return self._show_edit(request, values, adapted=False)

    def adapt_edit(self, request: gr.Request, *values: float) -> tuple[Any, Any]:
        """Show the expression as the command does, adapted to the portrait by trial frames, unless a newer one came."""
        session = self._session(request)
        portrait = session.portrait
        if session.edit == values and any(values[: len(SHOWN_CONTROLS)]):
            adapted = self._show_edit(request, values, adapted=True)
            if session.edit == values and session.portrait is portrait:
                return adapted
        return gr.skip(), gr.skip()

    def _show_edit(self, request: gr.Request, values: Sequence[float], *, adapted: bool) -> tuple[str | None, str]:
        basis = values[len(SHOWN_CONTROLS) :]
        controls = {name: value for name, value in zip(SHOWN_CONTROLS, values, strict=False) if value}
        arguments = [f"--set={name}={value:g}" for name, value in controls.items()]
        edits = {v: value for v, value in enumerate(basis, 1) if value} or ({} if controls else {1: 0.0})
        arguments += [part for v, value in edits.items() for part in ("--v", f"{v}", f"--scale={value:g}")]
        ends = tuple((v, (value, value)) for v, value in edits.items())

        def make(portrait: Portrait, out: Path) -> None:
            expression = ExpressionEdit(controls, adapted=adapted)
            edit_basis(self.animator, portrait, out, EditOptions(frames=1, edits=ends, expression=expression))

        frame = self._show(request, make)
        return frame, self._command(request, "edit-basis", [*arguments, "-o", "expression.png"])

    def reenact(
        self, photo: str | None, person: str | None, also: list[str] | None, force: bool, video: str | None,
        sound: str | None, text: str | None, expression: float, pose: float, seconds: float, framing: str, mark: str,
        request: gr.Request, progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for this default
    ) -> tuple[str, str, list[str]]:  # fmt: skip
        """Animate the photo by a sound or video; return the result, its command and the last videos.

        `progress` is the bar on the page.
        """
        session, photo = self._session(request), person or photo
        session.cancelled.clear()

        def report(stage: str, done: int, total: int | None) -> None:
            if session.cancelled.is_set():
                raise Export3DError("The rendering was cancelled.")
            progress((done, total), unit=stage)

        driver, photos = sound or video, tuple(map(Path, also or ()))
        with self._show_errors():
            if photo is None or driver is None:
                raise InputError("a photo and a video or sound are needed: drop both into the page")
            session.uploads |= {Path(path) for path in (photo, video, sound, *(also or ())) if path}
            text = (text or "").strip()  # None until something is typed
            if text and not sound:
                raise InputError("what a sound says needs the sound: drop it into the page, or clear the text")
            script = self._new_file(session, ".txt") if text else None
            if script is not None:
                script.write_text(text, encoding="utf-8")
            options = ReenactOptions(
                expression_scale=expression, pose_scale=pose, duration=seconds, framing=framing,  # type: ignore[arg-type]
                watermark=mark, drive_by="sound" if sound else "auto", text=script, also=photos, force=force,  # type: ignore[arg-type]
            )  # fmt: skip
            out = self._new_file(session, ".mp4")
            progress(0, desc="Reading the photo and the driver")
            reenact(self.animator, Path(photo), Path(driver), out, options, progress=report)
        arguments = [Path(driver).name, "-o", "out.mp4", f"--duration={seconds:g}", "--frame", framing]
        arguments += [f"--expression-scale={expression:g}", f"--pose-scale={pose:g}", "--watermark", mark]
        arguments += ["--text", "what-it-says.txt"] if script else []
        videos = sorted(session.folder.glob("*.mp4"), key=os.path.getmtime, reverse=True)
        return str(out), self._command(request, "reenact", arguments), [str(path) for path in videos]

    def cancel(self, request: gr.Request) -> None:
        """Stop the running job of this page."""
        self._session(request).cancelled.set()

    def _session(self, request: gr.Request) -> Session:
        key = str(request.session_hash)
        if key not in self._sessions:
            self._sessions[key] = Session(Path(tempfile.mkdtemp(dir=self._folder)))
        return self._sessions[key]

    def _new_file(self, session: Session, suffix: str) -> Path:
        """Return a name for a result, and delete old ones; browsers cache by name, so it is never used twice."""
        made = session.folder.glob(f"export3d-*{suffix}")
        for old in sorted(made, key=lambda path: int(path.stem.rpartition("-")[2]))[:-4]:
            old.unlink(missing_ok=True)
        return session.folder / f"export3d-{next(self._numbers)}{suffix}"

    def _show(self, request: gr.Request, make: Callable[[Portrait, Path], object]) -> str | None:
        """Make a picture of the session's portrait."""
        session = self._session(request)
        if session.portrait is None:
            return None
        with self._show_errors():
            out = self._new_file(session, ".png")
            make(session.portrait, out)
        return str(out)

    def _command(self, request: gr.Request, command: str, arguments: list[str]) -> str:
        session = self._session(request)
        also = [part for path in session.also for part in ("--also", path.name)] + ["--force"] * session.force
        return shlex.join(["export3d", command, (session.photo or Path("photo.jpg")).name, *arguments, *also])

    @contextlib.contextmanager
    def _show_errors(self) -> Iterator[None]:
        """Show errors that the user can correct as a message on the page, with names of files for their paths."""
        try:
            yield
        except Export3DError as error:
            line = re.sub(rf"{re.escape(str(self._folder))}/(\w+/)*", "", str(error))
            raise gr.Error(line, duration=None, print_exception=False) from error
