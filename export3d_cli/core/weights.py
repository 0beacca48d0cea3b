"""From the name of weights to a local file: embedded ones by the manifest, any by path, others from the hub.

The manifest says of each embedded file what it is, where it came from, under which licence, and its sha256, which is
checked whenever the file is asked for. No torch here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from export3d_cli.core.errors import InputError, WeightsError

DEFAULT = "export3d-compact"  # what animates when nothing else is named
_PACKAGE = Path(__file__).resolve().parents[1]
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")
_HUB_FILE = "model.safetensors"  # the hub's usual name, when none is given


@dataclass(frozen=True)
class Entry:
    """One line of the manifest."""

    name: str
    file: str  # within `weights_dir()`
    sha256: str
    size: int  # bytes
    licence: str  # SPDX name
    source: str  # where it came from
    what: str  # one sentence

    @property
    def path(self) -> Path:
        """Where the file lies, whether or not it is there."""
        return weights_dir() / self.file


def weights_dir() -> Path:
    """The folder of the embedded weights: package data in an installed wheel, `weights/` in a clone."""
    return _shipped("weights")


def example(name: str) -> Path:
    """A bundled example: `source.jpg` or `drive.mp4`."""
    path = _shipped("examples") / name
    if not path.is_file():
        raise InputError(f"the bundled example {name} is missing from {path.parent}: name a file of your own")
    return path


def manifest() -> dict[str, Entry]:
    """Every embedded file by its name."""
    path = weights_dir() / "manifest.yaml"
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))["weights"]
        entries = [Entry(**row) for row in rows]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot read {path} ({error}): install export3d-cli again") from error
    return {entry.name: entry for entry in entries}


def resolve(name: str | Path | None = None) -> Path:
    """A verified local file.

    Args:
        name: a name of the manifest, a path, or `hf:owner/repo[@revision][:file]`; None: the default weights.

    Raises:
        WeightsError: no such weights, a damaged file, or no way to fetch it; says what to do.
    """
    text = DEFAULT if name is None else str(name)
    if text.startswith("hf:"):
        return _from_hub(text)
    entries = manifest()
    if text in entries and not isinstance(name, Path):
        verify(entries[text])
        return entries[text].path
    if Path(text).is_file():
        return Path(text)
    names = ", ".join(entries)
    raise WeightsError(f"there are no weights {text!r}: give a file, hf:owner/repo[:file], or one of {names}")


def verify(entry: Entry) -> None:
    """Raise `WeightsError` unless the file is there, whole and unchanged."""
    if not entry.path.is_file():
        raise WeightsError(f"weights {entry.name!r} are missing ({entry.path}): install export3d-cli again")
    size = entry.path.stat().st_size
    if size != entry.size:
        raise WeightsError(f"{entry.path} has {size} bytes, not {entry.size}: install export3d-cli again")
    found = _sha256(entry.path)
    if found != entry.sha256:
        raise WeightsError(f"{entry.path} is damaged (sha256 {found[:12]}..., not {entry.sha256[:12]}...): reinstall")


def _from_hub(text: str) -> Path:
    """Download (resumable, cached) through huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, ..."""
    match = _HUB.fullmatch(text)
    if not match:
        raise WeightsError(f"{text!r} is not of the form hf:owner/repo[@revision][:file]")
    repo, revision, file = match["repo"], match["revision"], match["file"] or _HUB_FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    command = f"hf download {repo} {file}" + (f" --revision {revision}" if revision else "")
    try:
        path = Path(hf_hub_download(repo, file, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise WeightsError(
            f"{text} is not on this machine and cannot be fetched now: run `{command}` where there is a network"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{text} cannot be fetched ({reason}): see what `{command}` says") from error
    for entry in manifest().values():  # a listed file must be that very file, wherever it came from
        if entry.file == file and entry.source.startswith(f"hf:{repo}") and _sha256(path) != entry.sha256:
            raise WeightsError(f"{text} does not have the sha256 listed for it: remove {path} and fetch it again")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shipped(folder: str) -> Path:
    packaged = _PACKAGE / f"_{folder}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / folder
