"""The HTTP API: portraits, jobs, limits, the token, isolation, and any request that its description allows."""

from __future__ import annotations

import io
import threading
import time
import wave
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
from click.testing import CliRunner  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

from export3d_cli import server  # noqa: E402
from export3d_cli.core import Animator, Person, example_path, find_marks, read_image  # noqa: E402
from export3d_cli.core.face import speech  # noqa: E402
from export3d_cli.core.media.probe import probe  # noqa: E402
from export3d_cli.core.media.reader import VideoReader  # noqa: E402
from export3d_cli.core.media.writer import VideoWriter  # noqa: E402
from export3d_cli.main import cli  # noqa: E402

TOKEN = "0123456789abcdef"
PHOTO = example_path("source.jpg").read_bytes()
ABOUT_CONTENT = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.negative_data_rejection]
SMALL = {"framing": "face", "size": 64}


@pytest.fixture(scope="module")
def animator(tiny_weights: Path) -> Animator:
    return Animator.from_weights(tiny_weights, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Six frames of the bundled driver."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with (
        VideoReader(example_path("drive.mp4")) as reader,
        VideoWriter(path, size=(512, 512), fps=Fraction(25)) as writer,
    ):
        for image in islice(reader, 6):
            writer.write(image)
    return path.read_bytes()


@pytest.fixture
def client(animator: Animator, tmp_path: Path) -> Iterator[TestClient]:
    app = server.build(animator, TOKEN, tmp_path)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client
    assert list(tmp_path.iterdir()) == []  # nothing is left


@pytest.fixture
def service(client: TestClient) -> server.Service:
    """The object whose methods answer the client's requests."""
    route = next(route for route in client.app.routes if route.path == "/jobs/{job}")  # type: ignore[attr-defined]
    service: server.Service = route.endpoint.__self__
    return service


def add_portrait(client: TestClient) -> str:
    reply = client.post("/portraits", params=SMALL, content=PHOTO)
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


def wait(client: TestClient, reply: Any, state: str = "done") -> dict[str, Any]:
    """Wait until a job has reached a state."""
    assert reply.status_code == 202, reply.text
    for _ in range(1200):
        job: dict[str, Any] = client.get(f"/jobs/{reply.json()['id']}").json()
        if job["state"] in (state, "failed", "done"):
            assert job["state"] == state, job
            return job
        time.sleep(0.1)
    raise TimeoutError(job)


def fetch_image(client: TestClient, job: dict[str, Any]) -> np.ndarray:
    reply = client.get(f"/jobs/{job['id']}/result")
    assert reply.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB")).astype(int)


def test_photo_is_animated_by_a_video_and_the_driver_is_deleted(
    client: TestClient, clip: bytes, tmp_path: Path
) -> None:
    portrait = add_portrait(client)
    assert list(tmp_path.iterdir()) == []  # the photo is deleted once it is encoded
    job = wait(client, client.post(f"/portraits/{portrait}/videos", content=clip, params={"background": "#102030"}))
    assert (job["stage"], job["done"], job["error"]) == ("frames", 6, None)
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]
    reply = client.get(f"/jobs/{job['id']}/result")
    assert reply.headers["content-type"] == "video/mp4"
    (tmp_path / "copy.mp4").write_bytes(reply.content)
    info = probe(tmp_path / "copy.mp4")
    assert (info.width, info.height, round(info.duration * info.fps)) == (64, 64, 6)
    assert find_marks(tmp_path / "copy.mp4").metadata
    (tmp_path / "copy.mp4").unlink()
    assert client.delete(f"/jobs/{job['id']}").status_code == 204
    assert list(tmp_path.iterdir()) == []
    assert client.get(f"/jobs/{job['id']}/result").status_code == 404


def test_person_file_stands_for_a_photo(
    client: TestClient, animator: Animator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("person") / "me.person.safetensors"
    Person((read_image(example_path("source.jpg")),), None, animator.fingerprint, {}).save(path)
    for content, status in ((path.read_bytes(), 201), (path.read_bytes()[:5000], 422)):
        reply = client.post("/portraits", params=SMALL, content=content)
        assert reply.status_code == status, reply.text
        if status == 201:
            refused = client.post("/portraits", params={"also": reply.json()["id"]}, content=PHOTO)
            assert refused.status_code == 422 and "stands for the main photo alone" in refused.json()["detail"]


def test_more_photos_of_the_person_are_used_and_others_refused(client: TestClient, service: server.Service) -> None:
    first, mirrored = client.post("/portraits", content=PHOTO).json()["id"], io.BytesIO()
    Image.open(io.BytesIO(PHOTO)).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored, "PNG")
    reply = client.post("/portraits", params=SMALL | {"also": first}, content=mirrored.getvalue())
    assert reply.status_code == 201, reply.text
    (added,) = service._find(server.Portrait, reply.json()["id"])._encoded.others
    own = service._find(server.Portrait, first)._encoded.motion
    np.testing.assert_allclose(added.motion.beta, own.beta, atol=0.01)
    somebody = example_path("astronaut.jpg").read_bytes()
    refused = client.post("/portraits", params=SMALL | {"also": first}, content=somebody)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith(f"portrait {first} seems to show somebody else (similarity ")
    forced = client.post("/portraits", params=SMALL | {"also": first, "force": True}, content=somebody)
    assert forced.status_code == 201, forced.text
    assert client.post("/portraits", params={"also": "none"}, content=PHOTO).status_code == 404


def test_a_sound_with_its_text_moves_the_lips(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    aligned = []

    class Recognizer:
        def decode(self, samples: np.ndarray) -> list[speech.Phone]:
            return [speech.Phone("AA", 0.1, 0.3)]

        def align(self, samples: np.ndarray, said: list[str]) -> list[speech.Phone]:
            aligned.append(list(said))
            return self.decode(samples)

    monkeypatch.setattr(speech, "_Recognizer", Recognizer)
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((9000 * np.sin(np.arange(6400) / 9)).astype("<i2").tobytes())
    url, params = f"/portraits/{add_portrait(client)}/videos", {"text": "Ah, ah!"}
    job = wait(client, client.post(url, content=sound.getvalue(), params=params))
    assert (job["done"], aligned) == (10, [["ah", "ah"]])  # 0.4 s at 25 frames/s
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]
    assert client.delete(f"/jobs/{job['id']}").status_code == 204


def test_stills_show_controls_and_angles(client: TestClient) -> None:
    url = f"/portraits/{add_portrait(client)}/stills"
    plain, turned, opened = (
        fetch_image(client, wait(client, client.post(url, params=params)))
        for params in ({"yaw": 0}, {"yaw": 25, "pitch": 5}, {"control": ["jaw=0.8", "smile=.2"]})
    )
    assert plain.shape == turned.shape == opened.shape == (64, 64, 3)
    assert np.abs(turned - plain).mean() > 1
    failed = wait(client, client.post(url), "failed")
    assert "give basis vectors or controls" in failed["error"]
    assert client.post(f"/portraits/{failed['id']}/stills", params={"yaw": 0}).status_code == 404  # not a portrait
    assert client.get(f"/jobs/{failed['id']}/result").json()["detail"] == failed["error"]


@pytest.mark.parametrize(
    ("path", "params", "content", "line"),
    [
        ("", {}, b"", "photo is empty"),
        ("", {}, b"\xff\xd8 no photo", "photo is not an image that can be read: give a JPEG, PNG, WebP or HEIC file"),
        ("", {"size": 63}, PHOTO, "size: Input should be a multiple of 2, got '63'"),
        ("", {"face": "index:7"}, PHOTO, "the photo shows 1 face(s): index:7 does not exist"),
        ("/stills", {"control": "smil=1"}, b"", "there is no control 'smil': did you mean smile?"),
        ("/stills", {"control": "smile=7"}, b"", "smile must be 0 to 1, got 7"),
        ("/stills", {"control": "smile"}, b"", "String should match pattern"),
        ("/stills", {"yaw": "nan"}, b"", "yaw: "),
        ("/videos", {"background": "/etc/passwd"}, b"", "background: String should match"),
        ("/videos", {"kind": "../x"}, b"", "kind: Input should be 'mp4', 'png', 'npz' or 'csv'"),
    ],
)
def test_bad_input_is_one_clear_line(
    client: TestClient, path: str, params: dict[str, Any], content: bytes, line: str
) -> None:
    url = f"/portraits/{add_portrait(client)}{path}" if path else "/portraits"
    reply = client.post(url, params=params, content=content)
    assert reply.status_code == 422
    assert line in reply.json()["detail"]
    assert "\n" not in reply.json()["detail"]


def test_a_grey_photo_and_a_broken_driver_are_explained_without_paths(client: TestClient, tmp_path: Path) -> None:
    grey = io.BytesIO()
    Image.new("RGB", (128, 128), "grey").save(grey, "PNG")
    reply = client.post("/portraits", content=grey.getvalue())
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith("no face found in the photo")
    url = f"/portraits/{add_portrait(client)}"
    for kind in ("mp4", "png", "npz", "csv"):
        failed = wait(client, client.post(f"{url}/videos", params={"kind": kind}, content=b"nothing"), "failed")
        assert f"driver.{kind}" in failed["error"]
        assert str(tmp_path) not in failed["error"]
        assert "\n" not in failed["error"]
    assert list(tmp_path.iterdir()) == []
    assert fetch_image(client, wait(client, client.post(f"{url}/stills", params={"yaw": 1}))).any()  # others go on


def test_requests_without_the_token_are_refused_before_their_body_is_read(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def receive(*_: object) -> None:
        raise AssertionError("the body was read")

    monkeypatch.setattr(server.Service, "_receive", receive)
    for token in ("", "Bearer", "Bearer 0123456789abcdeg", "Basic " + TOKEN, "Bearer \xe9"):
        for method, path in (("POST", "/portraits"), ("GET", "/jobs/x"), ("DELETE", "/portraits/x")):
            reply = client.request(method, path, content=b"x", headers={b"Authorization": token.encode("latin-1")})
            assert reply.status_code == 401
            assert reply.json() == {"detail": "send the header Authorization: Bearer TOKEN"}
    assert client.get("/openapi.json", headers={"Authorization": ""}).status_code == 200
    for page in ("/docs", "/redoc"):
        assert client.get(page).status_code == 404


def test_limits_of_size_number_and_time(
    client: TestClient, clip: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server, "MAX_PORTRAITS", 1)
    monkeypatch.setattr(server, "MAX_JOBS", 2)
    url = f"/portraits/{add_portrait(client)}"
    assert client.post("/portraits", content=PHOTO).json()["detail"] == "there are 1 portraits: delete one, or wait"
    monkeypatch.setattr(server, "MAX_DRIVER_BYTES", 1 << 20)
    reply = client.post(f"{url}/videos", content=(bytes(1 << 16) for _ in range(20)))
    assert (reply.status_code, "more than 1 MiB" in reply.json()["detail"]) == (413, True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(server, "JOB_TIMEOUT_S", 0)
    late = wait(client, client.post(f"{url}/videos", content=clip), "failed")
    assert late["error"] == "the job took more than 0 s: use a shorter driver"
    monkeypatch.setattr(server, "JOB_TIMEOUT_S", 60)
    done = wait(client, client.post(f"{url}/stills", params={"yaw": 3}))
    reply = client.post(f"{url}/stills", params={"yaw": 3})
    assert (reply.status_code, reply.json()["detail"]) == (429, "there are 2 jobs: delete one, or wait")
    assert client.delete(f"/jobs/{late['id']}").status_code == 204
    wait(client, client.post(f"{url}/stills", params={"yaw": 3}))
    assert client.get(f"/jobs/{done['id']}/result").status_code == 200


def test_unused_portraits_and_results_are_deleted(
    animator: Animator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server, "CLEAN_UP_INTERVAL_S", 0.1)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(server.build(animator, TOKEN, tmp_path), headers=headers) as client:
        portrait = add_portrait(client)
        job = wait(client, client.post(f"/portraits/{portrait}/stills", params={"yaw": 3}))
        assert len(list(tmp_path.iterdir())) == 1
        monkeypatch.setattr(server, "KEEP_S", 0.2)
        time.sleep(1)
        assert client.get(f"/jobs/{job['id']}").status_code == 404
        assert client.delete(f"/portraits/{portrait}").status_code == 404
        assert list(tmp_path.iterdir()) == []


def test_jobs_run_in_turn_and_a_running_and_a_waiting_one_can_be_deleted(
    client: TestClient, clip: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_on, reenact = threading.Event(), server.core.reenact

    def slow(*arguments: Any, progress: Any) -> Any:
        def report(*counts: Any) -> None:
            go_on.wait(60)
            progress(*counts)

        return reenact(*arguments, progress=report)

    url = f"/portraits/{add_portrait(client)}"
    monkeypatch.setattr(server.core, "reenact", slow)
    first, second = (client.post(f"{url}/videos", content=clip) for _ in range(2))
    third = client.post(f"{url}/stills", params={"yaw": 2})
    wait(client, first, "running")
    assert client.get(f"/jobs/{second.json()['id']}").json()["state"] == "waiting"
    detail = client.get(f"/jobs/{second.json()['id']}/result").json()["detail"]
    assert detail == "the job is waiting: wait until it is done"
    for job in (first, second):
        assert client.delete(f"/jobs/{job.json()['id']}").status_code == 204
        assert client.get(f"/jobs/{job.json()['id']}").status_code == 404
    go_on.set()
    kept = wait(client, third)
    assert {path.name for path in tmp_path.iterdir()} == {f"{kept['id']}-out.png"}  # of the third alone


def test_a_defect_is_logged_and_the_client_gets_one_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a secret path")

    url = f"/portraits/{add_portrait(client)}/stills"
    with monkeypatch.context() as patch:
        patch.setattr(server.core, "novel_view", fail)
        failed = wait(client, client.post(url, params={"yaw": 3}), "failed")
        assert failed["error"] == "internal error: the output of the program shows where"
        patch.setattr(server.core, "read_portrait", fail)
        reply = client.post("/portraits", content=PHOTO)
        assert (reply.status_code, reply.json()["detail"]) == (500, failed["error"])
    assert [record.exc_info[0] for record in caplog.records if record.exc_info][:2] == [KeyError] * 2
    wait(client, client.post(url, params={"yaw": 3}))


def test_any_request_of_the_description_gets_a_described_reply(
    animator: Animator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemathesis sends requests that fit the description and others, to ids that exist and to others."""
    monkeypatch.setattr(server, "MAX_JOBS", 1000)
    app = server.build(animator, TOKEN, tmp_path)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    get = schema["/jobs/{job}"]["GET"]
    portrait = schema["/portraits"]["POST"].Case(query=SMALL, body=PHOTO, media_type="application/octet-stream")
    ids = {"portrait": portrait.call(headers=headers).json()["id"]}
    still = schema["/portraits/{portrait}/stills"]["POST"].Case(path_parameters=ids, query={"yaw": 3})
    started = still.call(headers=headers)
    assert started.status_code == 202
    ids["job"] = started.json()["id"]
    assert get.Case(path_parameters=ids).call(headers=headers).status_code == 200
    codes: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(
            case=operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE),
            exists=st.booleans() if operation.method != "delete" else st.just(False),
        )
        def check(case: Any, exists: bool) -> None:
            if exists:
                case.path_parameters |= ids
            response = case.call_and_validate(headers=headers, excluded_checks=ABOUT_CONTENT)
            codes.setdefault(case.operation.label, set()).add(response.status_code)
            assert len(response.content.splitlines()) <= 1 or response.status_code == 200

        check()
    assert len(codes) == 7
    assert set().union(*codes.values()) <= {200, 201, 202, 401, 404, 409, 422}  # 401: without the token
    assert 200 in codes["GET /jobs/{job}"]


@pytest.mark.parametrize("token", ["short", "with spaces in it all", "älter als sechzehn"])
def test_weak_tokens_are_refused(token: str) -> None:
    result = CliRunner().invoke(cli, ["serve", "--token", token, "--port", "8081"])
    assert result.exit_code == 2
    assert "must have at least 16 characters" in result.stderr


def test_a_port_in_use_is_one_clear_error(animator: Animator) -> None:
    with server.socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(server.core.InputError, match=f"127.0.0.1:{port} cannot be opened .*choose another --port"):
            server.serve(animator, "127.0.0.1", port, TOKEN)
