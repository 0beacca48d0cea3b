"""Atomic writes of files and folders, folder locks, and checks of input files and paths."""

import contextlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import struct
import time
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export3d_cli.core.runtime.errors import Export3DError, Export3DWarning, InputError

_HOST_ID = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY_NAME = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part.*")  # groups: host, process ID
DECODE_ERRORS: tuple[type[Exception], ...] = (  # raised by Pillow for damaged images
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, EOFError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
DAMAGED_ZIP_ERRORS: tuple[type[Exception], ...]  # raised by zipfile and NumPy
DAMAGED_ZIP_ERRORS = (*DECODE_ERRORS, MemoryError, tokenize.TokenError, zipfile.BadZipFile)
MAX_NAME_BYTES = 255  # of a file name, on all usual file systems
MAX_MANIFEST_BYTES = 2**30  # limit for a dataset's manifest
_STALE_AFTER_S = 86_400  # age at which a temporary file counts as abandoned, even if its process may be alive
_cleaned_folders: set[Path] = set()  # folders that this process has cleaned


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` (same suffix); rename it on success, delete it on failure.

    Also deletes temporary files that killed processes left in the folder. Raises `InputError` if the folder is not
    writable, `Export3DError` if writing failed midway.
    """
    path = Path(path)
    check_name_length(path)
    with _temporary_path(path.parent, path, path.suffix) as temporary:
        yield temporary
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success move its files to `folder`, on failure delete it.

    A new `folder` appears at once, with all files. In an existing one they appear one by one and never replace others.
    Raises the same errors as `write_atomic`.
    """
    parent = folder if folder.is_dir() else folder.parent
    with _temporary_path(parent, folder) as temporary:
        temporary.mkdir()
        yield temporary
        if parent != folder:
            temporary.rename(folder)  # fails if another process has filled it meanwhile
            return
        if any((folder / path.name).exists() for path in temporary.iterdir()):
            raise InputError(f"{folder} now contains files of the same name: choose another folder")
        for path in sorted(temporary.iterdir()):
            path.rename(folder / path.name)


@contextlib.contextmanager
def _temporary_path(folder: Path, output: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a hidden path in the folder of an output, for a file or folder that is deleted at the end if it is left."""
    _make_folder(folder)
    if not os.access(folder, os.W_OK):  # fail before the work, not in ffmpeg after it
        raise InputError(f"cannot write to folder {folder} (no permission): choose another output")
    folder = folder.absolute()
    if folder not in _cleaned_folders:  # once per process, because folders can be large
        _cleaned_folders.add(folder)
        remove_stale_temporaries(folder)
    temporary = _temporary_name(folder, suffix)
    try:
        with translate_os_errors(output):
            yield temporary
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to folder {folder} ({error.strerror}): choose another output") from error


def _temporary_name(folder: Path, suffix: str = "") -> Path:
    """Return a unique hidden name that contains the host and the process."""
    return folder / f".{_HOST_ID}-{os.getpid()}-{secrets.token_hex(4)}.part{suffix}"


def shorten_name(name: str, max_bytes: int) -> str:
    """Cut a file name between characters to a number of bytes, in which file systems count: 3 a Chinese character."""
    return os.fsencode(name)[:max_bytes].decode("utf-8", "ignore") if len(os.fsencode(name)) > max_bytes else name


def check_name_length(path: Path) -> None:
    """Raise `InputError` if a file name is longer than file systems allow."""
    size = len(os.fsencode(path.name))
    if size > MAX_NAME_BYTES:
        raise InputError(f"{path} is a name of {size} bytes, more than {MAX_NAME_BYTES}: choose a shorter name")


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` while writing `path` to an `InputError` or `Export3DError`."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another output") from error
    except BrokenPipeError:  # from a closed terminal, not from the file
        raise
    except OSError as error:
        reason = error.strerror or error
        raise Export3DError(f"cannot write {path} ({reason}): free disk space or choose another output") from error


def remove_stale_temporaries(folder: Path) -> None:
    """Delete the temporary files and folders that dead processes left in `folder`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY_NAME.fullmatch(entry.name)
            if match and _is_abandoned(match[1], int(match[2]), entry):
                _remove(Path(entry.path))


def _is_abandoned(host: str, process: int, entry: os.DirEntry[str]) -> bool:
    if host == _HOST_ID and os.name != "nt":
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # killed, and its parent has not noticed yet
        except ProcessLookupError:
            return True
        except OSError:  # alive, of another user; or there is no /proc
            pass
    return time.time() - entry.stat().st_mtime > _STALE_AFTER_S


@contextlib.contextmanager
def folder_lock(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Lock `folder`, which is created, against other processes. The system drops the lock when the process ends.

    `shared` locks exclude only others that are not. A conflicting lock raises `Export3DError`, unless `wait`. Issues an
    `Export3DWarning` if the system or the file system has no locks.
    """
    _make_folder(folder)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Export3DError(f"another process uses {folder}: wait for it, or choose another folder") from error
        except (ImportError, OSError) as error:  # Windows; file systems without locks
            reason = getattr(error, "strerror", None) or error
            message = f"{folder} cannot be locked ({reason}): do not use it in two commands at the same time"
            warnings.warn(message, Export3DWarning, stacklevel=3)
        yield


def driver_track_id(clip: str) -> str:
    """Return `tNN` for a clip `<head>_tNN` (one motion shared by several heads), else ''."""
    head, _, tail = clip.rpartition("_t")
    return f"t{tail}" if head and tail.isdigit() else ""


def read_manifest(dataset: Path) -> list[dict[str, Any]]:
    """Return the rows of a data set's manifest: at least `id`, and `file` and `motion` inside the data set.

    Raises `InputError` for a folder that `preprocess` did not write.
    """
    try:
        rows = read_rows(dataset / "manifest.jsonl")
        for row in rows:
            for name in (row["file"], row["motion"], row.get("depth") or "."):
                if "\0" in name or len(name) > 1000 or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"{name[:80]!r} is not a path inside the dataset")
            if Path(row["id"]).name != row["id"]:  # files of reports are named after it
                raise ValueError(f"invalid clip id {row['id'][:80]!r}")
    except (InputError, ValueError, KeyError, TypeError) as error:
        reason = ("" if isinstance(error, InputError) else f"{type(error).__name__}: ") + str(error)[:200]
        raise InputError(f"{dataset} is not a data set ({reason}): make one with `export3d preprocess`") from error
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a list of a data set: one JSON object with an `id` per line. Raises `InputError` or `ValueError`."""
    check_file(path, MAX_MANIFEST_BYTES)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{**row, "id": str(row["id"])} for row in rows]
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_file(path: Path, max_bytes: float = math.inf) -> None:
    """Raise `InputError` unless `path` is a regular file of at most `max_bytes`; devices and pipes can be endless."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder: give a file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a device or a pipe: give a file")
    if status.st_size > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes / 2**20:.0f} MiB: reduce its size")
