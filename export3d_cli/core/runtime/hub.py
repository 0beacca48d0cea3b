"""Download (cached and verified) and upload of weights on the Hugging Face Hub.

All requests go through huggingface_hub, which reads HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN, resumes
interrupted downloads and draws its own progress bar. Its errors become a `WeightsError` with a remedy. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from export3d_cli.core.runtime.errors import WeightsError

_NAME_PATTERN = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
_DEFAULT_FILE = "model.safetensors"  # the usual name on the Hub


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub: `hf:owner/repo[@revision][:file]`."""

    repo: str
    revision: str | None = None  # branch, tag or commit; None: the main branch
    file: str = _DEFAULT_FILE

    @classmethod
    def parse(cls, text: str) -> HubFile:
        """Parse the name; raise `WeightsError` if it is malformed."""
        match = _NAME_PATTERN.fullmatch(text)
        if not match:
            raise WeightsError(f"{text!r} must have the form hf:owner/repo[@revision][:file]")
        return cls(match["repo"], match["revision"], match["file"] or _DEFAULT_FILE)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f":{self.file}" if self.file != _DEFAULT_FILE else "")


def fetch(name: HubFile, *, force: bool = False) -> Path:
    """Return the path of the file in the Hub's cache; download it if it is not cached, or with `force` in any case.

    The sha256 that the Hub states for large files is verified on every call.
    """
    import huggingface_hub
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    try:
        cached = huggingface_hub.try_to_load_from_cache(name.repo, name.file, cache, revision=name.revision)
        if not isinstance(cached, str):  # fail at once if the Hub is unreachable; a download retries for half a minute
            url = huggingface_hub.hf_hub_url(name.repo, name.file, revision=name.revision, endpoint=_endpoint())
            huggingface_hub.get_hf_file_metadata(url, timeout=10)
        path = Path(
            huggingface_hub.hf_hub_download(
                name.repo, name.file, revision=name.revision, cache_dir=cache, force_download=force,
                endpoint=_endpoint(),
            )
        )  # fmt: skip
    except Exception as error:  # classes of the library's and its HTTP client's errors differ between versions
        raise WeightsError(_error_message(error, name)) from error
    stored, actual = path.resolve(), file_sha256(path)
    if re.fullmatch(r"[0-9a-f]{64}", stored.name) and actual != stored.name:  # the cache names large files by sha256
        stored.unlink()
        path.unlink(missing_ok=True)
        retry = f"run `export3d weights download {name}`"
        raise WeightsError(f"{name} was damaged (sha256 {actual[:12]}...) and deleted: {retry}")
    return path


def commit_of(path: Path) -> str:
    """Return the commit of a file in the Hub's cache; '' for other files."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else ""


def push(path: Path, name: HubFile, card: str, *, private: bool = False) -> str:
    """Upload a weights file, and `card` as README.md if the repository has none; return the URL of the commit."""
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=_endpoint())
    try:
        api.create_repo(name.repo, private=private, exist_ok=True)
        files: dict[str, Path | bytes] = {name.file: path}
        if not api.file_exists(name.repo, "README.md", revision=name.revision):
            files["README.md"] = card.encode()
        adds = [huggingface_hub.CommitOperationAdd(target, content) for target, content in files.items()]
        message = f"Add {name.file} with export3d"
        return str(api.create_commit(name.repo, adds, commit_message=message, revision=name.revision).commit_url)
    except Exception as error:  # as above
        raise WeightsError(_error_message(error, name, verb="upload")) from error


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _error_message(error: Exception, name: HubFile, verb: str = "download") -> str:
    """Return the problem and the remedy on one line, without tokens."""
    class_names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_unreachable = class_names & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError"}
    remedy = "check the name"
    if "OfflineModeIsEnabled" in class_names:
        problem, remedy = "HF_HUB_OFFLINE is set", "unset it"
    elif status in (401, 403) or class_names & {"GatedRepoError", "LocalTokenNotFoundError"}:
        problem = f"it does not exist, or is private or gated ({status})"
        remedy = "sign in (`hf auth login`) or set HF_TOKEN"
    elif "RevisionNotFoundError" in class_names:
        problem = f"the repository has no revision {name.revision!r}"
    elif "EntryNotFoundError" in class_names and not is_unreachable:
        problem = f"the repository has no file {name.file!r}"
    elif "RepositoryNotFoundError" in class_names:
        problem = "no such repository"
    elif status is not None:
        problem, remedy = f"the Hub answered {status}", "wait"
    elif is_unreachable:
        problem, remedy = f"{_endpoint() or 'https://huggingface.co'} cannot be reached", "check the network"
    else:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
    retry = f"run `export3d weights download {name}`" if verb == "download" else "push again"
    return _redact(f"cannot {verb} {name}: {problem}: {remedy}, then {retry}")


def _redact(text: str) -> str:
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        text = text.replace(secret, "***") if secret else text
    return re.sub(r"//[^/@\s]+@", "//", re.sub(r"hf_\w{8,}", "***", text))
