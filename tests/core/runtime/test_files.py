"""Atomic writes, names of temporary files, and locks of folders."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from export3d_cli.core.runtime.errors import Export3DError, Export3DWarning, InputError
from export3d_cli.core.runtime.files import (
    _HOST_ID,
    _temporary_name,
    folder_lock,
    remove_stale_temporaries,
    shorten_name,
    write_atomic,
    write_folder,
)
from export3d_cli.main import LazyGroup


def test_folder_lock_refuses_another_user_of_the_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new"), pytest.raises(Export3DError, match="another process uses"):
        folder_lock(tmp_path / "new").__enter__()
    with folder_lock(tmp_path / "new", shared=True), folder_lock(tmp_path / "new", shared=True):
        pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_folder_lock_without_locks_warns(tmp_path: Path) -> None:
    with pytest.warns(Export3DWarning, match=r"cannot be locked \(No locks available\)"), folder_lock(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_command_prints_warnings_as_notes(tmp_path: Path) -> None:
    group = LazyGroup()

    @click.command
    def lock() -> None:
        for _ in range(2):
            with folder_lock(tmp_path):
                click.echo("locked")

    group.get_command = lambda ctx, name: lock  # type: ignore[method-assign]
    result = CliRunner().invoke(group, ["lock"])
    assert result.stdout == "locked\nlocked\n"
    line = f"note: {tmp_path} cannot be locked (No locks available): do not use it in two commands at the same time\n"
    assert result.stderr == line * 2


@pytest.mark.parametrize("name", ["画" * 83, "a" * 251, "\udcff" * 90], ids=["Chinese", "ASCII", "no text"])
def test_write_atomic_and_write_folder_accept_names_as_long_as_the_system_allows(tmp_path: Path, name: str) -> None:
    with write_atomic(tmp_path / f"{name}.mp4") as temporary:
        temporary.with_stem(temporary.stem + "-picture").write_bytes(b"")  # as a video writer does
        temporary.with_stem(temporary.stem + "-picture").unlink()
        temporary.write_bytes(b"content")
        assert temporary.suffix == ".mp4"
    assert (tmp_path / f"{name}.mp4").read_bytes() == b"content"
    with write_folder(tmp_path / name) as folder:
        (folder / "00000.png").write_bytes(b"image")
    assert sorted(os.fsencode(path.name) for path in tmp_path.iterdir()) == sorted(
        [os.fsencode(name), os.fsencode(f"{name}.mp4")]
    )
    with write_folder(tmp_path / name) as folder:
        (folder / "00001.png").write_bytes(b"image")
    assert len(list((tmp_path / name).iterdir())) == 2


@pytest.mark.parametrize("name", ["画" * 84 + ".mp4", "a" * 252 + ".mp4"])
def test_write_atomic_refuses_too_long_names_before_the_work(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(InputError, match="256 bytes, more than 255: choose a shorter name"),
        write_atomic(tmp_path / name),
    ):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_remove_stale_temporaries_keeps_those_of_running_processes(tmp_path: Path) -> None:
    """Those of another host count as abandoned after a day."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    running = _temporary_name(tmp_path, ".mp4")
    dead = running.with_name(running.name.replace(f"-{os.getpid()}-", f"-{int(ended.stdout)}-"))
    elsewhere, old = (dead.with_name(dead.name.replace(_HOST_ID, host)) for host in ("00000000", "00000001"))
    for path in (running, dead, elsewhere, old):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    remove_stale_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == {running, elsewhere}


@pytest.mark.parametrize(
    ("name", "size", "short"),
    [("abc", 9, "abc"), ("abcdef", 3, "abc"), ("画家", 5, "画"), ("a😀b", 4, "a"), ("é", 1, "")],
)
def test_shorten_name_cuts_between_characters(name: str, size: int, short: str) -> None:
    assert shorten_name(name, size) == short
