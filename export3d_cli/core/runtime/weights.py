"""Weights files: bundled ones by their name in the manifest, others by path or from the Hugging Face Hub.

The manifest states content, origin, licence and sha256 of each bundled file. The sha256 is verified on every use.

All requests go through huggingface_hub, which reads HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN, resumes
interrupted downloads and draws its own progress bar. Its errors become a `WeightsError` with a remedy. No torch here.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from export3d_cli.core.runtime.errors import InputError, WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

DEFAULT_WEIGHTS = "export3d-compact"
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ManifestEntry:
    """A bundled file in the manifest."""

    name: str
    file: str  # within `weights_dir()`
    sha256: str
    size: int  # bytes
    licence: str  # SPDX identifier
    source: str  # origin
    what: str  # description, one sentence

    @property
    def path(self) -> Path:
        """Path of the file, which may be missing."""
        return weights_dir() / self.file


def weights_dir() -> Path:
    """Return the folder of the bundled weights: package data in an installed wheel, `weights/` in a clone."""
    return _bundled_folder("weights")


def example_path(name: str) -> Path:
    """Return the path of a bundled example: `source.jpg` or `drive.mp4`."""
    path = _bundled_folder("examples") / name
    if not path.is_file():
        raise InputError(f"the bundled example {name} is missing from {path.parent}: use a file of your own")
    return path


def weights_manifest() -> dict[str, ManifestEntry]:
    """Return the manifest's entries by name."""
    path = weights_dir() / "manifest.yaml"
    try:
        entries = [ManifestEntry(**row) for row in yaml.safe_load(path.read_text(encoding="utf-8"))["weights"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot read {path} ({error}): reinstall export3d-cli") from error
    return {entry.name: entry for entry in entries}


def resolve_weights(name: str | Path | None = None, *, force: bool = False) -> Path:
    """Return the path of a weights file: a name in the manifest, a path, or `hf:owner/repo[@revision][:file]`.

    None is the default weights; `force` downloads a cached file again. Raises `WeightsError` if the weights do not
    exist, are damaged, or cannot be downloaded.
    """
    text = DEFAULT_WEIGHTS if name is None else str(name)
    if text.startswith("hf:"):
        return _fetch(text, force)
    entries = weights_manifest()
    if text in entries and not isinstance(name, Path):
        verify_weights(entries[text])
        return entries[text].path
    if Path(text).is_file():
        return Path(text)
    names = ", ".join(entries)
    raise WeightsError(f"no weights {text!r}: give a file, hf:owner/repo[:file], or one of {names}")


def verify_weights(entry: ManifestEntry) -> None:
    """Raise `WeightsError` unless the file exists with the listed sha256."""
    if not entry.path.is_file():
        raise WeightsError(f"weights {entry.name!r} are missing ({entry.path}): reinstall export3d-cli")
    sha256 = file_sha256(entry.path)
    if sha256 != entry.sha256:
        hashes = f"sha256 {sha256[:12]}..., must be {entry.sha256[:12]}..."
        raise WeightsError(f"{entry.path} is damaged ({hashes}): reinstall export3d-cli")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a `.npz` file; raises `WeightsError` if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return dict(data)
    except DAMAGED_ZIP_ERRORS as error:
        raise WeightsError(f"{path} is damaged ({error}): reinstall export3d-cli") from error


@dataclass(frozen=True)
class WeightsInfo:
    """Contents of a weights file's header."""

    path: Path
    size: int  # bytes
    sha256: str
    revision: str  # commit on the Hub; '' for other files
    licence: str  # SPDX identifier
    parameters: int | None  # parameter count; None for files other than safetensors
    config: dict[str, Any]  # model configuration
    record: dict[str, Any]  # training record


def weights_info(name: str | Path | None = None) -> WeightsInfo:
    """Read the model configuration, training record, licence and size from the header of a weights file."""
    path = resolve_weights(name)
    entry = next((e for e in weights_manifest().values() if e.path == path), None)
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else ""  # of the Hub's cache
    facts = (path, path.stat().st_size, file_sha256(path), commit)
    if entry and path.suffix != ".safetensors":
        return WeightsInfo(*facts, entry.licence, None, {}, {})
    try:
        with safe_open(path, framework="np") as file:
            meta = file.metadata() or {}
            count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a safetensors file ({error}): give weights written by export3d") from error
    try:
        config, record = json.loads(meta["config"]), json.loads(meta["record"])
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not an export3d weights file: its header has no config and record") from error
    return WeightsInfo(*facts, meta.get("licence", ""), count, config, record)


def weights_card(info: WeightsInfo, name: str) -> str:
    """Return a Markdown model card for the Hub, from the header of a weights file."""

    def dump(**values: Any) -> str:
        return yaml.safe_dump(values, sort_keys=False).strip()

    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    head, details = dump(license=info.licence.lower() or "other"), dump(training=info.record, network=info.config)
    return template.format(
        head=head,
        details=details,
        name=name,
        info=info,
        megabytes=info.size / 1e6,
        licence=info.licence or "not stated",
    )


def upload_weights(path: Path, name: str, *, private: bool = False) -> str:
    """Upload weights to `hf:owner/repo[@branch][:file]`, and a model card if there is none; return the commit's URL."""
    import huggingface_hub

    repo, revision, file = _parse_hub_name(name).values()
    card, api = weights_card(weights_info(path), name), huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        adds = [huggingface_hub.CommitOperationAdd(file, path)]
        if not api.file_exists(repo, "README.md", revision=revision):
            adds.append(huggingface_hub.CommitOperationAdd("README.md", card.encode()))
        message = f"Add {file} with export3d"
        return str(api.create_commit(repo, adds, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # as in `_fetch`
        raise WeightsError(_error_message(error, name, verb="upload")) from error


def _bundled_folder(folder: str) -> Path:
    packaged = _PACKAGE / f"_{folder}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / folder


def _parse_hub_name(name: str) -> dict[str, Any]:
    """Return huggingface_hub's arguments for `hf:owner/repo[@branch, tag or commit][:file]`."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@]+))?(?::([^:]+))?", name)
    if not match:
        raise WeightsError(f"{name!r} must have the form hf:owner/repo[@revision][:file]")
    return {"repo_id": match[1], "revision": match[2], "filename": match[3] or "model.safetensors"}


def _fetch(name: str, force: bool) -> Path:
    """Return the path of a file of the Hub in its cache; download it if it is not cached, or with `force`.

    The sha256 that the Hub states for large files is verified on every call.
    """
    import huggingface_hub

    place = _parse_hub_name(name)
    revision = place.pop("revision")
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(**place, revision=revision), str):
            # fail at once if the Hub is unreachable; a download retries for half a minute
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**place, revision=revision), timeout=10)
        path = Path(huggingface_hub.hf_hub_download(**place, revision=revision, force_download=force))
    except Exception as error:  # classes of the library's and its HTTP client's errors differ between versions
        raise WeightsError(_error_message(error, name)) from error
    stored, actual = path.resolve(), file_sha256(path)
    if re.fullmatch(r"[0-9a-f]{64}", stored.name) and actual != stored.name:  # the cache names large files by sha256
        stored.unlink()
        path.unlink(missing_ok=True)
        retry = f"run `export3d weights download {name}`"
        raise WeightsError(f"{name} was damaged (sha256 {actual[:12]}...) and deleted: {retry}")
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _error_message(error: Exception, name: str, verb: str = "download") -> str:
    """Return the problem and the remedy on one line, without tokens."""
    from huggingface_hub import constants

    place, names = _parse_hub_name(name), {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_unreachable = names & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError"}
    remedy = "check the name"
    if "OfflineModeIsEnabled" in names:
        problem, remedy = "HF_HUB_OFFLINE is set", "unset it"
    elif status in (401, 403) or names & {"GatedRepoError", "LocalTokenNotFoundError"}:
        problem = f"it does not exist, or is private or gated ({status})"
        remedy = "sign in (`hf auth login`) or set HF_TOKEN"
    elif "RevisionNotFoundError" in names:
        problem = f"the repository has no revision {place['revision']!r}"
    elif "EntryNotFoundError" in names and not is_unreachable:
        problem = f"the repository has no file {place['filename']!r}"
    elif "RepositoryNotFoundError" in names:
        problem = "no such repository"
    elif status is not None:
        problem, remedy = f"the Hub answered {status}", "wait"
    elif is_unreachable:
        problem, remedy = f"{constants.ENDPOINT} cannot be reached", "check the network"
    else:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
    retry = f"run `export3d weights download {name}`" if verb == "download" else "push again"
    text = f"cannot {verb} {name}: {problem}: {remedy}, then {retry}"
    for secret in filter(None, (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(secret, "***")
    return re.sub(r"//[^/@\s]+@", "//", re.sub(r"hf_\w{8,}", "***", text))
