"""A hub id or a local folder: which it is, and the error when it cannot be had."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line

TIMEOUT_S = 3.0


def resolve_path(path: str, key: str) -> str:
    """``path`` as loaders take it: an existing local folder, expanded, or a hub id. Else raises ``VitPatchError``.

    For a hub id the hub is tried first, so that loaders do not wait where it does not answer.
    """
    for client in ("httpx", "httpx2"):  # each logs every request
        logging.getLogger(client).setLevel(logging.WARNING)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.exists() or local.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise VitPatchError(f"{key} {path}: no such folder; give an existing one, or a hub id such as owner/name")
    go_offline_if_unreachable()
    return path


def go_offline_if_unreachable() -> None:
    """Turns the hub's offline mode on where it does not answer in 3 s; its own client would try for half a minute."""
    import datasets.config
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except httpx.HTTPError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes started from here
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def explain_failure(error: BaseException, path: str, key: str, download: str) -> str:
    """One line on why ``path`` did not load; ``download`` are options of ``hf download`` that stand before the id."""
    if Path(path).expanduser().exists() or not _is_of_the_network(error):
        return one_line(error)
    return (
        "the hub cannot be reached and there is no local copy of it. Where there is a network run "
        f"`hf download {download}{path}` and bring its cache here (HF_HOME names the place, HF_HUB_OFFLINE=1 keeps "
        f"from asking the hub), or give a local folder: {key}=FOLDER"
    )


def _is_of_the_network(error: BaseException | None) -> bool:
    """Whether an error came about because the hub could not be asked."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if not constants.HF_HUB_OFFLINE:
        return False
    while error is not None:
        if isinstance(error, ConnectionError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def local_copy(path: str, revision: str | None, kind: str) -> Path | None:
    """The folder that ``hf download`` left of a ``model`` or ``dataset``, named by its commit, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, repo_type=kind, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def commit_of(path: str, revision: str | None, kind: str) -> str | None:
    """The commit of a ``model`` or ``dataset`` on the hub; where it does not answer, of the local copy, if any."""
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(path, repo_type=kind, revision=revision).sha
    except _no_answer():
        copy = local_copy(path, revision, kind)
        return copy.name if copy else None


def model_files(path: str, revision: str | None) -> list[str]:
    """The names of a model's files on the hub; where it does not answer, of the local copy."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(path, revision=revision)
    except _no_answer():
        copy = local_copy(path, revision, "model")
        return [file.name for file in copy.iterdir()] if copy else []


def _no_answer() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError
