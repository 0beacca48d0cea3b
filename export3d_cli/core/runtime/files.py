"""Atomic writes: a temporary name beside the target, then a rename. What may be read, and who may write where."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import stat
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from export3d_cli.core.runtime.errors import Export3DError, InputError

_HOST_ID = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY_NAME = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part.*")  # machine, process
DAMAGED_ZIP_ERRORS: tuple[type[Exception], ...] = (  # what zipfile and NumPy raise for archives that somebody has changed
    OSError, KeyError, ValueError, TypeError, ArithmeticError, EOFError, MemoryError, RecursionError, RuntimeError,
    SyntaxError, AttributeError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
MAX_MANIFEST_BYTES = 2**30  # bytes of a list of clips
_STALE_AFTER_S = 86_400  # seconds after which a temporary file of another machine is nobody's
_cleaned_folders: set[Path] = set()  # folders that this process has looked through


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); rename it on success, remove it on any failure.

    What killed processes left beside it is removed too. Raises `InputError` where nothing may be written, and
    `Export3DError` where it fails on the way (a full disk).
    """
    path = Path(path)
    _prepare_folder(path.parent)
    temporary = _temporary_name(path.parent, path)
    try:
        with translate_os_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success its files appear in `folder`, on any failure it is removed.

    They appear all at once where there is no `folder` yet, and else one after the other, at the end; none replaces
    another. Raises as `write_atomic` does.
    """
    where = folder if folder.is_dir() else folder.parent
    _prepare_folder(where)
    temporary = _temporary_name(where, folder.absolute())  # "." has no name
    try:
        with translate_os_errors(folder):
            temporary.mkdir()
            yield temporary
            if where == folder:
                if any((folder / path.name).exists() for path in temporary.iterdir()):
                    raise InputError(f"{folder} holds such files by now: give another folder")
                for path in sorted(temporary.iterdir()):
                    path.rename(folder / path.name)
            else:
                temporary.rename(folder)  # refused if somebody else has filled it by now
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prepare_folder(folder: Path) -> None:
    """Make the folder of an output, and remove what killed processes left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to folder {folder} ({error.strerror}): choose another output") from error
    if not os.access(folder, os.W_OK):  # said before the work, not by ffmpeg after it
        raise InputError(f"cannot write to folder {folder} (no permission): choose another output")
    folder = folder.absolute()
    if folder not in _cleaned_folders:  # once a process, for folders can be large
        _cleaned_folders.add(folder)
        remove_stale_temporaries(folder)


def _temporary_name(folder: Path, path: Path) -> Path:
    """One that tells whose it is."""
    return folder / f".{path.stem[:80]}.{_HOST_ID}-{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}"


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """What the system says against writing, as our errors."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another output") from error
    except BrokenPipeError:  # of a terminal that is gone, not of the file
        raise
    except OSError as error:
        raise Export3DError(f"cannot write {path} ({error.strerror or error}): make room, or choose another") from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what processes that are no more left in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY_NAME.fullmatch(entry.name)
            if found and _is_abandoned(found[1], int(found[2]), entry):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)


def _is_abandoned(host: str, process: int, entry: os.DirEntry[str]) -> bool:
    if host != _HOST_ID or os.name == "nt":  # there is no asking whether it lives
        return time.time() - entry.stat().st_mtime > _STALE_AFTER_S
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is another user's
        return False
    try:  # a process that ended and that nobody has asked for yet writes no more
        ended = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        ended = False
    return ended or process == os.getpid()  # one before us had the same number


@contextlib.contextmanager
def folder_lock(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep other processes from working in `folder`, which is made; ends with the process, however it ends.

    Args:
        folder: the folder.
        shared: let in others who share it.
        wait: wait for a process that holds it, instead of raising `Export3DError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to folder {folder} ({error.strerror}): choose another output") from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Export3DError(f"another process is at work in {folder}: wait for it, or name another one") from error
        except OSError:  # a file system that knows no locks
            pass
        yield
    finally:
        os.close(handle)


def driver_track_id(clip: str) -> str:
    """`tNN` of a clip `<head>_tNN`, the same motion on several heads, or ''."""
    head, _, tail = clip.rpartition("_t")
    return f"t{tail}" if head and tail.isdigit() else ""


def check_file(path: Path, max_bytes: int) -> None:
    """Raise `InputError` unless `path` is a plain file of at most `most` bytes: devices and pipes may never end."""
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
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB: make it smaller first")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere for a moment: some libraries write there, past every logger."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed: quiet already
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def ensure_relative(name: str) -> None:
    """A list that came from elsewhere names nothing outside its data set; raises `ValueError` where it does."""
    if "\0" in name or len(name) > 1000 or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name[:80]!r} is no file inside the data set")
