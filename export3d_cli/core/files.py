"""Atomic writes: a temporary name beside the target, then a rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from export3d_cli.core.errors import InputError


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); rename it on success, remove it on any failure."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to folder {path.parent} ({error.strerror}): choose another output") from error
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except PermissionError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)
