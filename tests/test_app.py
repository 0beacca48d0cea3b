"""The page of `export3d app` in headless Chromium: photo, preview, video, no request to elsewhere; that of `live`."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.live import COMMANDS
from export3d_cli.core.animation.watermark import find_marks
from export3d_cli.core.face import speech
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.mjpeg_server import MjpegServer
from export3d_cli.core.media.probe import probe
from export3d_cli.core.runtime.weights import example_path

pytestmark = pytest.mark.filterwarnings("ignore")  # of Gradio and its libraries
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium", allow_module_level=True)
pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
sync_api = pytest.importorskip("playwright.sync_api")
sync_api.expect.set_options(timeout=60_000)  # of slow machines

from export3d_cli import app  # noqa: E402 - needs Gradio


@pytest.fixture(scope="module")
def address(tiny_weights: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    animator = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    with app.serve(animator, port) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        yield address
    assert not folder.exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def result_files() -> list[Path]:
    return list(Path(os.environ["GRADIO_TEMP_DIR"]).glob("*/export3d-*"))


def preview_of(page: Any, label: str, value: float) -> np.ndarray:
    """Set a slider and return the new preview, (H, W, 3)."""
    preview = page.locator("img[src*='/export3d-'][src$='.png']:visible")
    before = preview.get_attribute("src")
    page.get_by_label(label).first.fill(str(value))
    page.get_by_label(label).first.press("Tab")
    sync_api.expect(preview).not_to_have_attribute("src", before)
    reply = page.request.get(preview.get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(reply.body())).convert("RGB")).astype(int)


def test_two_tabs_keep_their_photos_apart_and_a_reload_begins_afresh(
    address: str, browser: Any, tmp_path: Path
) -> None:
    write_image(tmp_path / "other.jpg", np.ascontiguousarray(read_image(example_path("source.jpg"))[:, ::-1]))
    context = browser.new_context()
    pages = [context.new_page() for _ in range(2)]
    for page in pages:
        page.set_default_timeout(120_000)
        page.goto(address)
    pages[1].get_by_label("Remove Image").click()
    pages[1].locator("input[type=file]").first.set_input_files(tmp_path / "other.jpg")
    for page in pages:
        page.get_by_role("tab", name="Turn").click()
    commands = [page.locator(".cm-content:visible") for page in pages]
    sync_api.expect(commands[1]).to_contain_text("novel-view other.jpg")
    first, other = preview_of(pages[0], "Yaw", 20), preview_of(pages[1], "Yaw", 20)
    assert np.abs(first - other).mean() > 5
    again = (preview_of(pages[0], "Yaw", -10), preview_of(pages[0], "Yaw", 20))[1]
    assert np.array_equal(again, first)
    for command, name in zip(commands, ("source.jpg", "other.jpg"), strict=True):
        sync_api.expect(command).to_have_text(f"export3d novel-view {name} --yaw=20 --pitch=0 -o view.png")

    pages[0].get_by_role("tab", name="Expression").click()
    assert np.abs(preview_of(pages[0], "jaw", 0.5) - first).mean() > 1
    command = "export3d edit-basis source.jpg --set=jaw=0.5 -o expression.png"
    sync_api.expect(commands[0]).to_have_text(command)

    old = set(result_files())
    pages[1].reload()
    pages[1].get_by_role("tab", name="Turn").click()
    sync_api.expect(commands[1]).to_contain_text("novel-view source.jpg")
    assert np.array_equal(preview_of(pages[1], "Yaw", 20), first)
    for _ in range(60):
        kept = old & set(result_files())
        if len({path.parent for path in kept}) == 1:
            break
        time.sleep(0.5)
    assert len({path.parent for path in kept}) == 1  # the reloaded page's files are deleted, not the other's
    context.close()


def test_photo_becomes_preview_and_video_without_a_request_to_elsewhere(
    address: str, browser: Any, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.set_default_timeout(120_000)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.get_by_role("tab", name="Turn").click()
    preview = page.locator("img[src*='/export3d-'][src$='.png']:visible")
    before = preview.get_attribute("src")
    page.get_by_label("Yaw").first.fill("20")
    page.get_by_label("Yaw").first.press("Tab")
    sync_api.expect(preview).not_to_have_attribute("src", before)
    (tmp_path / "view.png").write_bytes(page.request.get(preview.get_attribute("src")).body())
    assert find_marks(tmp_path / "view.png").metadata
    command = page.locator(".cm-content:visible")
    sync_api.expect(command).to_have_text("export3d novel-view source.jpg --yaw=20 --pitch=0 -o view.png")

    page.get_by_role("tab", name="Animate").click()
    page.get_by_text("Options").click()
    seconds = page.get_by_label("Seconds of the video").first
    sync_api.expect(seconds).to_have_value("600")  # the page sets it when the options open, which would replace ours
    seconds.fill("1")
    seconds.press("Tab")
    page.get_by_role("button", name="Render").click()
    link = page.locator("a[download][href*='.mp4']")
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height, info.duration) == (512, 512, pytest.approx(1, abs=0.05))
    assert find_marks(tmp_path / "out.mp4").metadata
    made = page.locator("video:not([src$='/drive.mp4'])")
    sync_api.expect(made).to_have_count(2)  # the result, and the gallery of results
    sync_api.expect(command).to_contain_text("export3d reenact source.jpg drive.mp4 -o out.mp4 --duration=1")
    assert requests
    assert [url for url in requests if not url.removeprefix("blob:").startswith(address)] == []

    page.close()
    for _ in range(60):
        if not result_files():
            break
        time.sleep(0.5)
    assert not result_files()


def test_more_photos_are_used_and_a_recorded_sound_drives(
    address: str, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    class Recognizer:
        def align(self, samples: np.ndarray, words: list[str]) -> list[speech.Phone]:
            said.append(list(words))
            return self.decode(samples)

        def decode(self, samples: np.ndarray) -> list[speech.Phone]:
            return [speech.Phone("AA", 0.1, 0.3)]

    monkeypatch.setattr(speech, "_Recognizer", Recognizer)
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((9000 * np.sin(np.arange(6400) / 9)).astype("<i2").tobytes())
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_text("More photos of the person").click()
    files = page.locator("input[type=file]")  # photo, person file, more photos
    files.nth(2).set_input_files(example_path("astronaut.jpg"))
    page.get_by_text(re.compile("^astronaut.jpg seems to show somebody else .*, or pass --force$")).wait_for()
    page.get_by_label("Use them even if").check()
    page.get_by_role("tab", name="Turn").click()
    command = page.locator(".cm-content:visible")
    line = "export3d novel-view source.jpg --yaw=0 --pitch=0 -o view.png --also astronaut.jpg --force"
    sync_api.expect(command).to_have_text(line)
    page.get_by_role("tab", name="Animate").click()
    page.get_by_text("Speech instead of a video").click()
    page.get_by_label("What it says").fill("Ah, ah!")
    page.get_by_role("button", name="Render").click()
    page.get_by_text("what a sound says needs the sound").wait_for()
    page.locator("input[type=file][accept*=audio]").last.set_input_files(tmp_path / "speech.wav")
    page.get_by_role("button", name="Render").click()
    page.locator("a[download][href*='.mp4']").wait_for()
    (video,) = [path for path in result_files() if path.suffix == ".mp4"]
    assert (round(25 * probe(video).duration), said) == (10, [["ah", "ah"]])
    sync_api.expect(command).to_contain_text("export3d reenact source.jpg speech.wav -o out.mp4")
    sync_api.expect(command).to_contain_text("--text what-it-says.txt --also astronaut.jpg --force")
    page.close()


def test_rendering_can_be_cancelled_and_a_bad_photo_is_explained(address: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_role("button", name="Render").click()
    page.get_by_text(re.compile("Reading the photo|frames")).first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("The rendering was cancelled.").wait_for()
    assert not [path for path in result_files() if path.suffix == ".mp4"]
    write_image(tmp_path / "grey.png", np.full((256, 256, 3), 128, np.uint8))
    (tmp_path / "text.jpg").write_text("no picture")
    for name, line in ("text.jpg", "text.jpg is not an image that can be read"), ("grey.png", "no face found in grey"):
        page.get_by_label("Remove Image").click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.get_by_text(line).wait_for()
    page.close()


def test_a_preview_is_adapted_unless_a_newer_one_came(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = app._Jobs(Animator.from_weights(tiny_weights, device="cpu", precision="fp32"), tmp_path)
    request, adapted = SimpleNamespace(session_hash="x"), []
    jobs.set_photo(str(example_path("source.jpg")), None, None, False, request)
    monkeypatch.setattr(app, "edit_basis", lambda *arguments: adapted.append(arguments[3].expression.adapted))
    zeros = [0.0] * (len(app.SHOWN_CONTROLS) - 1)
    smile, jaw = (0.5, *zeros), (0.0, 0.5, *zeros[1:])
    first, last = jobs.edit(request, *smile), jobs.adapt_edit(request, *smile)
    assert first[0] != last[0]
    assert first[1] == last[1] == "export3d edit-basis source.jpg --set=smile=0.5 -o expression.png"
    jobs.edit(request, *jaw)
    assert jobs.adapt_edit(request, *smile) == (app.gr.skip(), app.gr.skip())
    assert adapted == [False, True, False]
    with pytest.raises(app.gr.Error, match="two controls set eyeBlinkLeft"):
        jobs.edit(request, *[float(name in ("blink", "eyes-open")) for name in app.SHOWN_CONTROLS])


def test_addresses_in_place_of_files_and_other_sites_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but loopback is looked up, not even for the names that Gradio trusts."""
    hosts, look_up = set(), socket.getaddrinfo

    def record(host: Any, *rest: Any, **options: Any) -> Any:
        hosts.add(host)
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    with httpx.Client(base_url=address) as client:
        for headers in {"Host": "site.example"}, {"Origin": "http://site.example"}, {"Host": "127.0.0.1.site.example"}:
            for reply in (
                client.get("/config", headers=headers),
                client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers),
            ):
                assert reply.status_code == 403
        load = next(d for d in client.get("/config").json()["dependencies"] if [0, "load"] in d["targets"])
        for url in "https://huggingface.co/a.png", "http://203.0.113.7/a.png":
            assert client.get(f"/gradio_api/proxy={url}").status_code >= 400
            photo = {"path": url, "meta": {"_type": "gradio.FileData"}}
            call = {"data": [photo, None, None, False], "fn_index": load["id"], "session_hash": "x"}
            assert client.post("/gradio_api/queue/join", json=call).status_code == 200
            reply = client.get("/gradio_api/queue/data", params={"session_hash": "x"})
            assert "Give a file, not an address." in reply.text
    assert hosts <= {"127.0.0.1", "localhost"}


def test_live_page_is_used_by_keys_and_fits_a_phone(browser: Any) -> None:
    pressed: list[str] = []
    with MjpegServer("127.0.0.1", 0, COMMANDS, pressed.append) as server:
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.goto(f"http://127.0.0.1:{server.server_port}", wait_until="domcontentloaded")  # the picture loads on
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        for key in (*(name[0] for name in COMMANDS), "x", "Control+m", "Tab", "Enter"):  # Tab: to the first button
            page.keyboard.press(key)
        for _ in range(50):
            if len(pressed) > len(COMMANDS):
                break
            page.wait_for_timeout(100)
        assert sorted(pressed) == sorted([*COMMANDS, "calibrate"])
        page.close()
