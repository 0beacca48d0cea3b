"""Pictures of frames: all of them under their names, or none; and nobody's pictures are replaced."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from faultkit import left

from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime import files
from export3d_cli.core.runtime.errors import Export3DError, InputError, MediaError

NAMES = ["00000.png", "00001.png", "00002.png"]


def writer(folder: Path) -> VideoWriter:
    return VideoWriter(folder / "%05d.png", size=(8, 4), fps=Fraction(25))


def write(to: VideoWriter, count: int = 3) -> None:
    for number in range(count):
        to.write(np.full((4, 8, 3), 9 * number, np.uint8))


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "frames"
    with writer(folder) as to:
        write(to)
        assert not folder.exists()
    assert left(folder) == NAMES
    assert left(folder.parent) == ["frames"]
    assert [int(read_image(folder / name)[0, 0, 0]) for name in NAMES] == [0, 9, 18]
    assert folder.stat().st_mode == tmp_path.joinpath("a").stat().st_mode


@pytest.mark.parametrize("there", [[], ["notes.txt"]])
def test_a_folder_that_is_there_keeps_its_files(there: list[str], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).write_text("mine")
    with writer(tmp_path) as to:
        write(to)
        assert not [name for name in left(tmp_path) if name in NAMES]
    assert left(tmp_path) == [*NAMES, *there]


def test_the_folder_where_we_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(Path("%05d.png"), size=(8, 4), fps=Fraction(25)) as to:
        write(to)
        (name,) = left(tmp_path)
        assert files._TEMPORARY_NAME.fullmatch(name)  # so that it is removed, should we be killed
    assert left(tmp_path) == NAMES


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_that_fails_leaves_nothing(count: int, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with writer(folder) as to:
            write(to, count)
            if count:
                raise KeyboardInterrupt

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(KeyboardInterrupt if count else MediaError):
            fail(folder)
    assert left(tmp_path) == ["old"]
    assert left(tmp_path / "old") == ["notes.txt"]


@pytest.mark.parametrize("there", [True, False], ids=["there before", "not there before"])
def test_who_comes_second_is_told(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "frames"

    def come_late() -> None:
        with writer(folder) as late:
            write(late)
            folder.mkdir(exist_ok=True)
            (folder / NAMES[1]).write_text("of the first")

    if there:
        folder.mkdir()
    with pytest.raises(InputError if there else Export3DError, match="another"):
        come_late()
    assert left(folder) == [NAMES[1]]
    assert (folder / NAMES[1]).read_text() == "of the first"
    assert left(tmp_path) == ["frames"]
    with pytest.raises(InputError, match="already"):
        writer(folder)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_cleaned_folders", set())
    dead = tmp_path / f".frames.{files._HOST_ID}-{2**22 + 1}-00000000.part"  # beyond the largest number of a process
    alive = tmp_path / f".frames.{files._HOST_ID}-1-00000000.part"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / NAMES[0]).write_bytes(b"")
    with writer(tmp_path / "frames") as to:
        write(to)
    assert left(tmp_path) == [alive.name, "frames"]
