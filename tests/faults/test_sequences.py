"""Numbered pictures appear all at once or not at all, and existing pictures are never replaced."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from faultkit import list_names

from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime import files
from export3d_cli.core.runtime.errors import Export3DError, InputError, MediaError

NAMES = ["00000.png", "00001.png", "00002.png"]


def open_writer(folder: Path) -> VideoWriter:
    return VideoWriter(folder / "%05d.png", size=(8, 4), fps=Fraction(25))


def write_frames(writer: VideoWriter, count: int = 3) -> None:
    for number in range(count):
        writer.write(np.full((4, 8, 3), 9 * number, np.uint8))


def test_new_folder_appears_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "frames"
    with open_writer(folder) as writer:
        write_frames(writer)
        assert not folder.exists()
    assert list_names(folder) == NAMES
    assert list_names(folder.parent) == ["frames"]
    assert [int(read_image(folder / name)[0, 0, 0]) for name in NAMES] == [0, 9, 18]
    assert folder.stat().st_mode == tmp_path.joinpath("a").stat().st_mode


@pytest.mark.parametrize("existing", [[], ["notes.txt"]])
def test_existing_folder_keeps_its_files(existing: list[str], tmp_path: Path) -> None:
    for name in existing:
        (tmp_path / name).write_text("mine")
    with open_writer(tmp_path) as writer:
        write_frames(writer)
        assert not [name for name in list_names(tmp_path) if name in NAMES]
    assert list_names(tmp_path) == [*NAMES, *existing]


def test_current_folder_is_a_valid_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(Path("%05d.png"), size=(8, 4), fps=Fraction(25)) as writer:
        write_frames(writer)
        (name,) = list_names(tmp_path)
        assert files._TEMPORARY_NAME.fullmatch(name)  # recognised and removed after a kill
    assert list_names(tmp_path) == NAMES


@pytest.mark.parametrize("count", [0, 2])
def test_failed_run_leaves_nothing(count: int, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with open_writer(folder) as writer:
            write_frames(writer, count)
            if count:
                raise KeyboardInterrupt

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(KeyboardInterrupt if count else MediaError):
            fail(folder)
    assert list_names(tmp_path) == ["old"]
    assert list_names(tmp_path / "old") == ["notes.txt"]


@pytest.mark.parametrize("exists_before", [True, False])
def test_second_writer_is_refused(exists_before: bool, tmp_path: Path) -> None:
    folder = tmp_path / "frames"

    def write_late() -> None:
        with open_writer(folder) as late_writer:
            write_frames(late_writer)
            folder.mkdir(exist_ok=True)
            (folder / NAMES[1]).write_text("first writer")

    if exists_before:
        folder.mkdir()
    with pytest.raises(InputError if exists_before else Export3DError, match="another"):
        write_late()
    assert list_names(folder) == [NAMES[1]]
    assert (folder / NAMES[1]).read_text() == "first writer"
    assert list_names(tmp_path) == ["frames"]
    with pytest.raises(InputError, match="already"):
        open_writer(folder)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_cleaned_folders", set())
    dead = tmp_path / f".{files._HOST_ID}-{2**22 + 1}-00000000.part"  # larger than any process id
    alive = tmp_path / f".{files._HOST_ID}-1-00000000.part"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / NAMES[0]).write_bytes(b"")
    with open_writer(tmp_path / "frames") as writer:
        write_frames(writer)
    assert list_names(tmp_path) == [alive.name, "frames"]
