"""Commands with a bad input file: the exit code, one line on stderr, and no output."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_media import pictures, videos
from bad_numbers import arkit_csvs, configs, manifests, motions
from bad_numbers import weights as weight_files
from faultkit import ERROR_CODES, BadFile, TookTooLongError, check_error, list_names, run

from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import InputError

TINY = ("--device", "cpu", "--precision", "fp32", "--max-frames", "2", "--audio", "none", "--batch", "2")


def args_for(bad: BadFile, path: Path, good: SimpleNamespace, out: Path) -> list[object]:
    """Return the command line that reads this file."""
    if bad.reader == "config":
        return ["train", "--config", path, "--dry-run", f"run={out / 'run'}"]
    if bad.reader == "manifest":
        where = [f"data.path=[{path.parent}]", f"run={out / 'run'}", "steps=0", "stages=[reconstruction]"]
        return ["-q", "train", "--config", good.config, *where]  # -q: no note about plots that need an extra
    if bad.reader == "csv":
        return ["preprocess", path, "-o", out / "out.motion.npz"]
    source = path if bad.reader == "image" else good.source
    driver = path if bad.reader in ("video", "motion") else good.motion
    weights = path if bad.reader == "weights" else good.weights
    return ["reenact", "-o", out / "out.mp4", "--weights", weights, *TINY, "--", source, driver]


def check(bad: BadFile, good: SimpleNamespace, tmp_path: Path) -> int:
    """Run the command, check its result and return the exit code."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    if bad.reader == "manifest":
        (folder / "clips").symlink_to(good.data / "clips")
    bad.make(folder / bad.file)
    before = list_names(folder)
    ended = run(*args_for(bad, folder / bad.file, good, out))
    check_error(ended, ERROR_CODES[bad.reader] | ({0} if bad.harmless else set()))
    if bad.reader == "manifest":
        assert not (out / "run" / "weights.safetensors").exists()
    else:
        written = "out.motion.npz" if bad.reader == "csv" else "out.mp4"
        assert list_names(out) == ([] if ended.exit_code else [written])
    assert list_names(folder) == before
    return ended.exit_code


@pytest.mark.parametrize("bad", [*pictures(), *videos()], ids=str)
def test_media(bad: BadFile, good: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(bad, good, tmp_path)
    assert capfd.readouterr().err == "", "a library wrote past our one line"


def test_motion(good: SimpleNamespace, tmp_path: Path) -> None:
    """One file through the command, all of them through the reader."""
    check(next(motions(good.motion)), good, tmp_path)
    for bad in motions(good.motion):
        path = tmp_path / bad.name.replace("/", "-") / bad.file
        path.parent.mkdir()
        bad.make(path)
        with contextlib.suppress(InputError) if bad.harmless else pytest.raises(InputError):
            Motion.load(path)


@pytest.mark.parametrize("kind", ["weights", "config", "manifest", "csv"])
def test_numbers(kind: str, good: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = {
        "weights": lambda: weight_files(good.weights), "config": configs,
        "manifest": manifests, "csv": lambda: arkit_csvs(good.csv),
    }  # fmt: skip
    failures = []
    for number, bad in enumerate(made[kind]()):
        (tmp_path / str(number)).mkdir()
        try:
            check(bad, good, tmp_path / str(number))
        except (AssertionError, TookTooLongError) as error:
            failures.append(f"{bad}: {str(error).splitlines()[0][:300]}")
    assert not failures, "\n".join(failures)
    assert capfd.readouterr().err == ""
