"""C2PA content credentials: signed by the command, read by the library's own reader and by `verify-mark`."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from export3d_cli.core.media.content_credentials import _make_certificate, read_credentials, sign_file
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

c2pa = pytest.importorskip("c2pa")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.jpg", read_image(example_path("source.jpg"))[::8, ::8], comment=SYNTHETIC_COMMENT)
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("example", ["source.jpg", "drive.mp4"])
def test_signed_file_is_valid_says_that_it_is_synthetic_and_still_opens(example: str, tmp_path: Path) -> None:
    path = tmp_path / example
    shutil.copy(example_path(example), path)
    with path.open("ab") as file:  # the mark, in a box that players of MP4 skip
        file.write((8 + len(SYNTHETIC_COMMENT)).to_bytes(4, "big") + b"free" + SYNTHETIC_COMMENT.encode())
    path.chmod(0o600)
    assert read_credentials(path) is None
    result = CliRunner().invoke(cli, ["sign", str(path)])
    assert (result.exit_code, result.output) == (0, f"signed {path}\n")
    assert path.stat().st_mode & 0o777 == 0o600
    with c2pa.Reader(path) as reader:
        assert reader.get_validation_state() == "Valid"
        store = json.loads(reader.json())
    assert [status["code"] for status in store["validation_status"]] == ["signingCredential.untrusted"]
    found = read_credentials(path)
    assert found is not None
    assert (found.valid, found.trusted, found.generator, found.synthetic) == (True, False, "export3d", True)
    shown = json.loads(CliRunner().invoke(cli, ["verify-mark", str(path), "--json"]).stdout)
    assert shown["credentials"]["valid"]


def test_own_certificate_signs_and_a_changed_file_is_not_valid(picture: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for path, content in zip((certificate, key), _make_certificate(), strict=True):
        path.write_bytes(content)
    arguments = ["sign", str(picture), "--certificate", str(certificate), "--key", str(key)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    content = bytearray(picture.read_bytes())
    content[-50] ^= 1  # in the pixels' data
    picture.write_bytes(content)
    found = read_credentials(picture)
    assert found is not None and not found.valid
    assert "content credentials: not valid" in CliRunner().invoke(cli, ["verify-mark", str(picture)]).output


def test_bad_input_is_one_line_and_leaves_the_file_as_it_is(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, wrong = picture.read_bytes(), tmp_path / "wrong.pem"
    wrong.write_text("no key")
    (tmp_path / "a.mkv").write_bytes(b"-")
    with pytest.raises(InputError, match=r"content credentials need one of \.avif"):
        sign_file(tmp_path / "a.mkv")
    write_image(tmp_path / "photo.jpg", read_image(picture))
    with pytest.raises(InputError, match=r"photo\.jpg lacks the mark of this program"):
        sign_file(tmp_path / "photo.jpg")
    with pytest.raises(InputError, match="given together"):
        sign_file(picture, wrong)
    with pytest.raises(InputError, match=r"a\.jpg cannot be signed"):
        sign_file(picture, wrong, wrong)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InputError, match=r"pip install 'export3d-cli\[c2pa\]'"):
        sign_file(picture)
    assert read_credentials(picture) is None and picture.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


@pytest.mark.parametrize("data", [[1, 2], "abc", {"actions": [3]}, {"actions": None}, {"actions": [{}]}])
def test_credentials_of_others_never_raise(data: Any, picture: Path, tmp_path: Path) -> None:
    assertions = [{"label": "c2pa.actions.v2", "data": data}, {"label": "com.example.transactions", "data": [1]}]
    manifest = {"claim_generator_info": [{"name": "camera", "version": "1"}], "assertions": assertions}
    info = c2pa.C2paSignerInfo(b"es256", *_make_certificate(), None)
    out = tmp_path / "other.jpg"
    try:
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
            builder.sign_file(picture, out, signer)
    except c2pa.C2paError:
        return  # the library refuses to write it
    found = read_credentials(out)
    assert found is not None and not found.synthetic


def test_addresses_in_a_file_are_not_visited(picture: Path) -> None:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        xmp = (
            'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
            'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
            f'xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="http://127.0.0.1:{server.server_port}/a.c2pa"/>'
            "</rdf:RDF></x:xmpmeta>"
        ).encode()
        content = picture.read_bytes()
        picture.write_bytes(content[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + content[2:])
        assert read_credentials(picture) is None
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader(picture)  # by itself the library does ask
        server.shutdown()
    assert requests == ["/a.c2pa"]
