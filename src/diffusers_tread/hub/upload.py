# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Uploads that an unreliable connection delays but does not break."""

import glob
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, RepoUrl, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


# The errors of requests and hf_xet are OSErrors, those of httpx derive from a base that HfHubHTTPError has with httpx,
# and huggingface_hub makes RuntimeErrors of what befalls a single large file.
_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, *HfHubHTTPError.__bases__)
_SAFE = "Nothing local is lost: the same command later sends what is missing."

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def open_repo(
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    max_retries: int = 5,
) -> RepoUrl:
    """Makes a repository on the Hub if there is none; before long work, this tells whether its result can go there.

    Args:
        repo_id: "name" or "organisation/name".
        repo_type: "model" or "dataset".
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch, made if missing; None for the default one.
        token: For the Hub; None for that of `hf auth login` or HF_TOKEN.
        max_retries: Further tries if the Hub cannot be reached, 1, 2, 4, ... seconds apart.

    Returns:
        Its address, a string that also has the whole `repo_id`.

    Raises:
        ValueError: The Hub refuses: the token, the name.
        ConnectionError: The Hub could not be reached. The same call later goes on.
    """
    api = HfApi(token=token)

    def work() -> RepoUrl:
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        return url

    return _try(work, f"open {repo_id} on the Hub", repo_id, token=token, max_retries=max_retries)


def upload_folder(
    folder: str | Path,
    *,
    repo_id: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    ignore_patterns: Iterable[str] = (),
    commit_message: str | None = None,
    max_retries: int = 5,
) -> RepoUrl:
    """Uploads a folder to the Hub, making the repository if there is none.

    Only what is new is sent: files that the repository has are skipped, and so are large ones that an earlier, broken
    upload has sent. What is only in the repository stays there.

    Never sent are hidden files, such as `.env`, and links, whose targets lie elsewhere. Of a pipeline or of latents
    nothing is sent but the card and what `model_index.json` or `latents.json` names. A warning names what stays.

    Args:
        folder: What it holds of a pipeline, of latents or, without their index, of anything.
        repo_id: This and the next four as for `open_repo`.
        repo_type: "model" or "dataset".
        private: Whether a new repository is private.
        revision: Branch to upload to.
        token: For the Hub.
        ignore_patterns: Files to leave out, with wildcards.
        commit_message: First line of the commit.
        max_retries: Further tries, on top of those that huggingface_hub makes of single requests.

    Returns:
        The repository's address.

    Raises:
        ValueError: There is nothing to upload, or the Hub refuses: the token, the name, the content.
        ConnectionError: The Hub could not be reached. The same call later goes on.
    """
    folder = Path(folder)
    files, others = _list_files(folder)
    if not files:
        raise ValueError(f"Expected a folder with files to upload to {repo_id}, got {folder} with {others[:10]}.")
    if others:
        logger.warning(f"Not sent from {folder}, which is not of what was made there: {', '.join(others[:10])}.")
    common = {"repo_type": repo_type, "revision": revision}
    url = open_repo(repo_id, private=private, token=token, max_retries=max_retries, **common)

    def work() -> None:
        HfApi(token=token).upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            ignore_patterns=list(ignore_patterns),
            commit_message=commit_message,
            **common,
        )

    _try(work, f"upload {folder} to {url.repo_id}", url.repo_id, token=token, max_retries=max_retries)
    return url


def _list_files(folder: Path) -> tuple[list[str], list[str]]:
    """What is sent of a folder, and what is not, as names in it."""
    made = _names_of_index(folder)
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_link = any(parent.is_symlink() for parent in (path, *path.parents[: len(name.parts) - 1]))
        if path.is_symlink() or path.is_file():
            is_made = made is None or name.as_posix() in made or f"{name.parts[0]}/" in made
            (files if is_made and not is_hidden and not is_link else others).append(name.as_posix())
    return files, others


def _names_of_index(folder: Path) -> set[str] | None:
    """Files, and folders with a slash, of the pipeline or the latents in a folder; None for a folder of neither."""
    card = {"README.md", "samples.png"}
    if (index := folder / "model_index.json").is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        parts = {f"{name}/" for name, entry in content.items() if isinstance(entry, list) and any(entry)}
        return card | parts | {index.name, "pipeline.py"}
    if (index := folder / "latents.json").is_file():
        settings = {path.name for path in folder.glob("latents*.json")}
        return card | settings | {str(shard["file"]) for shard in json.loads(index.read_text())["shards"]}
    return None


def _try(work: Callable[[], Result], task: str, repo_id: str, *, token: str | None, max_retries: int) -> Result:
    for attempt in range(max_retries + 1):
        try:
            return work()
        except _ERRORS as error:
            _raise_if_final(error, task, repo_id, has_token=bool(token or get_token()))
            if attempt == max_retries:
                raise ConnectionError(
                    f"Expected to {task}, got no connection to the Hub in {max_retries + 1} tries ({error}). {_SAFE}"
                ) from error
            logger.warning(f"Failed to {task} ({error}). Trying again in {2**attempt} s.")
            time.sleep(2**attempt)
    raise AssertionError("not reached: the last try returns or raises")


def _raise_if_final(error: BaseException, task: str, repo_id: str, *, has_token: bool) -> None:
    """Raises a ValueError for what another try cannot mend; local files that cannot be read are raised as they are."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename is not None:
            raise error
        if isinstance(cause, OfflineModeIsEnabled):
            raise ValueError(f"Expected to {task}, got HF_HUB_OFFLINE=1. Unset it. {_SAFE}") from error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 500
        if status in (401, 403):
            raise ValueError(
                f"Expected a token that may write to {repo_id}, got {'one that may not' if has_token else 'none'} "
                f"({cause}). Run `hf auth login` or set HF_TOKEN. {_SAFE}"
            ) from error
        if status < 500 and status not in (408, 412, 429):
            raise ValueError(f"Expected to {task}, got a refusal: {cause}. {_SAFE}") from error
        cause = cause.__cause__
