import hashlib
import runpy
from pathlib import Path

import pytest
import yaml

from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.errors import WeightsError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Weights folder with one small file."""
    data = b"weights" * 100
    (tmp_path / "a.bin").write_bytes(data)
    row = {"name": "a", "file": "a.bin", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    row |= {"licence": "CC0-1.0", "source": "someone", "what": "A test."}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump({"weights": [row]}))
    monkeypatch.setattr(weights, "weights_dir", lambda: tmp_path)
    return tmp_path


def test_manifest_files_verify():
    entries = weights.weights_manifest()
    assert "face_landmarker" in entries
    for entry in entries.values():
        weights.verify_weights(entry)
        assert entry.licence
        assert entry.source
        assert entry.what


def test_manifest_lists_every_bundled_model():
    listed = {entry.file for entry in weights.weights_manifest().values()}
    bundled = {
        p.name
        for p in weights.weights_dir().iterdir()
        if p.suffix in {".task", ".safetensors", ".tflite", ".onnx", ".npz"}
    }
    assert bundled == listed


def test_example_path_returns_files():
    assert weights.example_path("source.jpg").is_file()
    assert weights.example_path("drive.mp4").is_file()


def test_resolve_weights_by_name_and_path(folder):
    assert weights.resolve_weights("a") == folder / "a.bin"
    assert weights.resolve_weights(folder / "a.bin") == folder / "a.bin"


def test_resolve_weights_of_damaged_file_raises(folder):
    data = bytearray((folder / "a.bin").read_bytes())
    data[5] ^= 1
    (folder / "a.bin").write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        weights.resolve_weights("a")
    (folder / "a.bin").unlink()
    with pytest.raises(WeightsError, match="missing"):
        weights.resolve_weights("a")


def test_resolve_weights_of_unknown_name_lists_names(folder):
    with pytest.raises(WeightsError, match=r"'b'.* a$"):
        weights.resolve_weights("b")


def test_resolve_weights_with_broken_manifest_raises(folder):
    (folder / "manifest.yaml").write_text("weights: [{name: x}]")
    with pytest.raises(WeightsError, match="manifest"):
        weights.resolve_weights("x")


@pytest.mark.parametrize("name", ["hf:", "hf:alone", "hf:a/b/c", "hf:a/b@", "hf:a/b:"])
def test_resolve_weights_of_malformed_hub_name_raises(folder, name):
    with pytest.raises(WeightsError, match="form hf:owner/repo"):
        weights.resolve_weights(name)


def read_table(text, command):
    """Return the rows of the table under a command, with numbers; nan where there is none."""
    lines = text.partition(command)[2].partition("|")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: [float(cell or "nan") for cell in cells] for name, *cells in rows}


def test_table_of_the_bundled_heads_is_what_evaluate_writes():
    script = Path(__file__).parents[1] / "weights" / "make_tables.py"
    text = script.with_name("README.md").read_text(encoding="utf-8")
    updated = runpy.run_path(str(script))["update_tables"](text, {})
    published, measured = (read_table(version, "evaluate BUNDLED") for version in (text, updated))
    assert list(published) == list(measured) and {"psnr dB ↑", "yaw error deg ↓", "identity cos ↑"} < set(measured)
    for name, row in published.items():  # other processors round differently, which the tracker amplifies
        factor = 0.2 if name.startswith("jitter") or name.endswith("slope") else 0.05
        tolerance = 0.002 + factor * max(abs(value) for value in row if value == value)
        assert measured[name] == pytest.approx(row, abs=tolerance, nan_ok=True), name
    assert updated.count("|") == text.count("|")  # the other tables stay
