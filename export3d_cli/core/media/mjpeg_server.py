"""A small local web page that shows a live picture (Motion JPEG) and has buttons."""

from __future__ import annotations

import contextlib
import html
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError

CLIENT_TIMEOUT_S = 10.0  # after which a viewer that reads nothing is disconnected
MAX_THREADS = 64  # of the process; further connections are closed
_LOOPBACK = ("127.0.0.1", "localhost")
_PAGE = Path(__file__).with_name("live.html")


class MjpegServer(ThreadingHTTPServer):
    """Serves the page while its `with` block runs: `/`, `/stream`, `/status` and the buttons' `/command/NAME`.

    Pages of other sites cannot use it. `buttons` are labels by command; threads call `on_press`. Port 0: a free one.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, buttons: Mapping[str, str], on_press: Callable[[str], None]) -> None:
        self.host, self.buttons, self.on_press = host, buttons, on_press
        self.status = ""  # the line of text under the picture
        self.changed = threading.Condition()
        self.jpeg: bytes | None = b""  # the newest frame; None: the end
        self._viewers = 0
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"http://{host}:{port} cannot be opened ({reason}): choose another port") from error

    def __enter__(self) -> MjpegServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._publish(None)
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own."""
        if threading.active_count() < MAX_THREADS:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def show(self, frame: np.ndarray) -> bool:
        """Show the next frame, uint8 (H, W, 3) RGB; return whether somebody watches."""
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=90, comment=SYNTHETIC_COMMENT)
        self._publish(file.getvalue())
        return self._viewers > 0

    def _publish(self, jpeg: bytes | None) -> None:
        with self.changed:
            self.jpeg = jpeg
            self.changed.notify_all()

    def frames(self) -> Iterator[bytes]:
        """Yield the newest frame whenever there is another one, to the end."""
        last: bytes | None = b""
        with self.changed:
            self._viewers += 1
        try:
            while True:
                with self.changed:
                    while self.jpeg is last:
                        self.changed.wait()
                    last = self.jpeg
                if last is None:
                    return
                yield last
        finally:
            with self.changed:
                self._viewers -= 1


class _Handler(BaseHTTPRequestHandler):
    server: MjpegServer
    timeout = CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        if not self._is_own_page():
            self.send_error(403)
        elif self.path == "/":
            labels = self.server.buttons.items()
            buttons = "".join(f'<button value="{name}">{html.escape(label)}</button>' for name, label in labels)
            page = _PAGE.read_text(encoding="utf-8").replace("{buttons}", buttons)
            self._send("text/html; charset=utf-8", page)
        elif self.path == "/status":
            self._send("text/plain; charset=utf-8", self.server.status)
        elif self.path == "/stream":
            self._send("multipart/x-mixed-replace; boundary=frame", "--frame\r\n")
            for jpeg in self.server.frames():
                head = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                self.wfile.write(head + jpeg + b"\r\n--frame\r\n")  # browsers show a part when the next one begins
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        name = self.path.removeprefix("/command/")
        if self._is_own_page() and name in self.server.buttons:
            self.server.on_press(name)
            self._send("text/plain", "")
        else:
            self.send_error(403)

    def _is_own_page(self) -> bool:
        """Return whether the request comes from this page or from no page; loopback has only local names."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_local = self.server.host not in _LOOPBACK or host.partition(":")[0] in _LOOPBACK
        return is_local and origin in (None, f"http://{host}")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:")
        self.end_headers()
        self.wfile.write(text.encode())

    def handle(self) -> None:
        """Serve one connection, which the viewer may end at any time."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Print nothing."""
