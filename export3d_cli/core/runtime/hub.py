"""Download (cached and verified) and upload of weights on the Hugging Face Hub.

All requests go through huggingface_hub, which reads HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN, resumes
interrupted downloads and draws its own progress bar. Its errors become a `WeightsError` with a remedy. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export3d_cli.core.runtime.errors import WeightsError

MAX_TRIES = 3  # of a download that the server or the network interrupted
RETRY_PAUSE_S = 1.0  # before the second try; twice as long before the third
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

    def at_commit(self, commit: str) -> HubFile:
        """Return the same file at a commit."""
        return HubFile(self.repo, commit or self.revision, self.file)


def fetch(name: HubFile, *, sha256: str | None = None, force: bool = False) -> Path:
    """Return the path of the file in the Hub's cache; download it if it is not cached.

    Args:
        name: the file.
        sha256: expected hash; None: the one that the Hub states for large files.
        force: download again even if it is cached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    for attempt in range(1, MAX_TRIES + 1):
        try:
            cached = huggingface_hub.try_to_load_from_cache(name.repo, name.file, cache, revision=name.revision)
            if not isinstance(cached, str):
                _check_reachable(name)
            fetched = huggingface_hub.hf_hub_download(
                name.repo,
                name.file,
                revision=name.revision,
                cache_dir=cache,
                force_download=force,
                endpoint=_endpoint(),
            )
            break
        except Exception as error:  # classes of the library's and its HTTP client's errors differ between versions
            if attempt == MAX_TRIES or not _is_transient(error):
                raise WeightsError(_error_message(error, name)) from error
            time.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))
    path = Path(fetched)
    stored = path.resolve()
    actual = file_sha256(path)
    if re.fullmatch(r"[0-9a-f]{64}", stored.name) and actual != stored.name:  # the cache names large files by sha256
        stored.unlink()
        path.unlink(missing_ok=True)
        raise WeightsError(f"{name} was damaged (sha256 {actual[:12]}...) and deleted: {_download_hint(name)}")
    if sha256 and actual != sha256:
        pinned = name.at_commit(commit_of(path))
        raise WeightsError(f"{pinned} has sha256 {actual[:12]}..., must have {sha256[:12]}... as listed: do not use it")
    return path


def _check_reachable(name: HubFile) -> None:
    """Raise at once if the Hub is unreachable; a download would retry for half a minute."""
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(name.repo, name.file, revision=name.revision, endpoint=_endpoint())
    huggingface_hub.get_hf_file_metadata(url, timeout=10)


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


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error, or None."""
    for link in _error_chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _error_chain(error) for kind in type(link).__mro__}


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry can help: a server error or an interrupted response body."""
    if "LocalEntryNotFoundError" in _class_names(error):  # the library has retried already
        return False
    status = _http_status(error)
    interrupted = {"RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError", "IncompleteRead"}
    return (
        status in (408, 429)
        or (status or 0) >= 500
        or bool(interrupted & _class_names(error))
        or "Consistency" in str(error)
    )


def _download_hint(name: HubFile) -> str:
    return f"run `export3d weights download {name}`"


def _error_message(error: BaseException, name: HubFile, verb: str = "download") -> str:
    """Return the problem and the remedy on one line, without tokens."""
    class_names, status = _class_names(error), _http_status(error)
    retry = _download_hint(name) if verb == "download" else "push again"
    sign_in = "sign in (`hf auth login`) or set HF_TOKEN"
    if "OfflineModeIsEnabled" in class_names:
        if verb == "upload":
            return f"cannot upload {name}: HF_HUB_OFFLINE is set"
        return f"{name} is not cached and HF_HUB_OFFLINE is set: unset it, then {retry}"
    if "LocalTokenNotFoundError" in class_names:
        return f"the Hub requires a login: {sign_in}, then {retry}"
    if status in (401, 403) or "GatedRepoError" in class_names:
        reason = "it does not exist, or is private or gated"
        return f"the Hub refuses to {verb} {name} ({status}): {reason}; {sign_in}, then {retry}"
    for class_name, problem in (
        ("RevisionNotFoundError", f"the repository has no revision {name.revision!r}"),
        ("EntryNotFoundError", f"the repository has no file {name.file!r}"),
        ("RepositoryNotFoundError", "no such repository"),
    ):
        if class_name in class_names and status == 404:
            return f"cannot {verb} {name}: {problem} ({status}); check the name"
    if status is not None and status >= 500:
        return f"cannot {verb} {name}: the Hub answered {status}; later, {retry}"
    if class_names & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError"}:
        url = _redact(_endpoint() or "https://huggingface.co")
        problem = f"{name} is not cached and" if verb == "download" else f"cannot upload {name}:"
        return f"{problem} {url} cannot be reached: check the network, then {retry}"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot {verb} {name} ({_redact(first_line)}): {retry}"


def _redact(text: str) -> str:
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        text = text.replace(secret, "***") if secret else text
    return re.sub(r"//[^/@\s]+@", "//", re.sub(r"hf_\w{8,}", "***", text))
