"""Locks of folders."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from export3d_cli.core.runtime.errors import Export3DError, Export3DWarning
from export3d_cli.core.runtime.files import folder_lock
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
