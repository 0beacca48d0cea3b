"""The documented Python API runs: the doctest of the core package, and the code blocks of README.md in order."""

from __future__ import annotations

import doctest
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export3d_cli import core
from export3d_cli.core.animation import animator as animate
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.runtime import weights

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
preset: tiny
license: CC0-1.0
run: run
device: cpu
batch: 2
steps: 2
sample_every: 0
stages: [reconstruction]
data: {path: [data]}
"""


def test_doctest_of_the_core_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """One portrait and three frames with the embedded weights."""
    result = doctest.testmod(core, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted >= 10


def test_type_marker_is_shipped() -> None:
    assert (ROOT / "export3d_cli" / "py.typed").is_file()


@pytest.fixture
def tiny_by_default(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiny untrained weights the default, for speed."""
    resolve = weights.resolve_weights
    monkeypatch.setattr(animate, "resolve_weights", lambda name=None: tiny_weights if name is None else resolve(name))


def test_code_blocks_of_the_readme_run(
    tiny_by_default: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("src.jpg").write_bytes(core.example_path("source.jpg").read_bytes())
    Path("config.yaml").write_text(CONFIG)
    Path("videos").mkdir()
    cut = [
        ffmpeg_path(),
        "-loglevel",
        "error",
        "-i",
        str(core.example_path("drive.mp4")),
        "-frames:v",
        "26",
        "-vf",
        "scale=256:-2",
    ]
    for name in ("drive.mp4", "videos/someone.mp4"):
        subprocess.run([*cut, name], check=True)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # as a reader would, one after another
    for made in ("out.mp4", "views.mp4", "edit.mp4", "drive.motion.npz", "data/manifest.jsonl"):
        assert Path(made).stat().st_size > 0, made
    lines = capsys.readouterr().out.splitlines()
    assert "export3d-compact" in lines[1]
    assert lines[-1] == "True"  # the mark was found


def test_readme_pictures_exist_and_are_small() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [ROOT / name for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
    assert len(shown) >= 5
    assert shown[0].suffix == ".gif"
    assert shown[0].stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in set(shown)) < 4_000_000
    unused = set((ROOT / "examples" / "pictures").iterdir()) - set(shown)
    assert not unused
