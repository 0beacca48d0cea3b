"""The live page: the newest picture, its mark, buttons, and requests of other sites."""

from __future__ import annotations

import contextlib
import http.client
import io
import random
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fuzz import mutate
from PIL import Image

from export3d_cli.core.media.mjpeg_server import MAX_THREADS, MjpegServer
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError


@pytest.fixture
def pressed() -> list[str]:
    return []


@pytest.fixture
def server(pressed: list[str]) -> Iterator[MjpegServer]:
    with MjpegServer("127.0.0.1", 0, {"pause": "Pause <b>"}, pressed.append) as server:
        yield server


def request(server: MjpegServer, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def read_part(stream: http.client.HTTPResponse) -> bytes:
    """Read the next JPEG, up to the boundary after it."""
    headers = [stream.readline() for _ in range(3)]
    jpeg = stream.read(int(headers[1].split()[1]))
    assert stream.readline() + stream.readline() == b"\r\n--frame\r\n"
    return jpeg


def test_stream_sends_the_newest_frame_with_the_synthetic_mark_and_ends_with_the_server(pressed: list[str]) -> None:
    frames = [np.full((32, 48, 3), (value, 40, 200), np.uint8) for value in (10, 200)]
    with MjpegServer("127.0.0.1", 0, {}, pressed.append) as server:
        stream = request(server, "GET", "/stream")
        assert stream.readline() == b"--frame\r\n"
        for frame in frames:
            server.show(frame)
            jpeg = read_part(stream)
            image = Image.open(io.BytesIO(jpeg))
            assert image.info["comment"] == SYNTHETIC_COMMENT.encode()
            assert np.abs(np.asarray(image).astype(int) - frame).max() <= 3
    assert stream.read() == b""


def test_page_shows_buttons_and_status_and_passes_commands_on(server: MjpegServer, pressed: list[str]) -> None:
    page = request(server, "GET", "/").read().decode()
    assert '<button value="pause">Pause &lt;b&gt;</button>' in page
    assert "http" not in page.replace("http-equiv", "")  # nothing from elsewhere
    server.status = "12 frames/s"
    assert request(server, "GET", "/status").read() == b"12 frames/s"
    assert request(server, "POST", "/command/pause").status == 200
    assert request(server, "POST", "/command/shutdown").status == 403
    assert request(server, "GET", "/../secret").status == 404
    assert pressed == ["pause"]


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example:80"}])
def test_other_sites_can_neither_read_nor_press(
    server: MjpegServer, pressed: list[str], headers: dict[str, str]
) -> None:
    assert request(server, "POST", "/command/pause", **headers).status == 403
    assert request(server, "GET", "/status", **headers).status == 403
    assert pressed == []


def test_mutated_requests_and_many_connections_leave_the_page_alive(
    server: MjpegServer, pressed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    rng, address = random.Random(1), ("127.0.0.1", server.server_port)
    head = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nContent-Length: 3\r\n\r\nabc"
    for _ in range(150):
        with contextlib.suppress(ConnectionError), socket.create_connection(address, timeout=20) as connection:
            connection.sendall(mutate(rng.choice((b"GET /", b"POST /command/pause")) + head, rng))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
    with contextlib.ExitStack() as stack:  # none of these sends a request
        for _ in range(2 * MAX_THREADS):
            stack.enter_context(socket.create_connection(address, timeout=10))
        assert threading.active_count() <= MAX_THREADS
    assert request(server, "GET", "/status").status == 200
    assert set(pressed) <= {"pause"}
    assert capfd.readouterr().err == ""


def test_port_in_use_is_one_clear_error(server: MjpegServer, pressed: list[str]) -> None:
    with pytest.raises(InputError, match=f"127.0.0.1:{server.server_port} cannot be opened .*choose another port"):
        MjpegServer("127.0.0.1", server.server_port, {}, pressed.append)
