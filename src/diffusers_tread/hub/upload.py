# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Uploads that survive an unreliable connection, by retries."""

import glob
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, RepoUrl, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


# Errors of requests and hf_xet are OSErrors, those of httpx share a base class with HfHubHTTPError, and
# huggingface_hub raises RuntimeErrors for single large files.
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
    """Creates a repository on the Hub if it is missing. Call it before long work to find problems early.

    Args:
        repo_id: "name" or "organisation/name".
        repo_type: "model" or "dataset".
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch, created if missing; None for the default one.
        token: Token for the Hub; None for that of `hf auth login` or HF_TOKEN.
        max_retries: Number of retries if the Hub cannot be reached, after 1, 2, 4, ... seconds.

    Returns:
        Its URL, a string that also has the full `repo_id` as an attribute.

    Raises:
        ValueError: The Hub refuses, for example the token or the name.
        ConnectionError: The Hub could not be reached. Call again to continue.
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
    """Uploads a folder to the Hub, and creates the repository if it is missing.

    Only new files are sent: files that the repository already has are skipped, and so are large files that an earlier,
    interrupted upload has sent. Other files in the repository are kept.

    Hidden files, such as `.env`, and links, which may point elsewhere, are never sent. From a folder with a pipeline
    or latents, only the card and the files that `model_index.json` or `latents.json` names are sent. A warning names
    files that are left out.

    Args:
        folder: A folder with a pipeline, with latents, or with any files.
        repo_id: "name" or "organisation/name".
        repo_type: "model" or "dataset".
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch, created if missing; None for the default one.
        token: Token for the Hub; None for that of `hf auth login` or HF_TOKEN.
        ignore_patterns: Files to leave out, with wildcards.
        commit_message: First line of the commit.
        max_retries: Number of retries, in addition to those that huggingface_hub makes for single requests.

    Returns:
        The repository's URL.

    Raises:
        ValueError: There is nothing to upload, or the Hub refuses, for example the token, the name or the content.
        ConnectionError: The Hub could not be reached. Call again to continue.
    """
    # Files to send.
    folder = Path(folder)
    files, others = _list_files(folder)
    if not files:
        raise ValueError(f"Expected a folder with files to upload to {repo_id}, got {folder} with {others[:10]}.")
    if others:
        logger.warning(f"Not sent from {folder}, which is not of what was made there: {', '.join(others[:10])}.")

    # Send them.
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
    """The files of a folder to send, and those to leave out, relative to the folder."""
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
    """The files, and folders with a slash, of the pipeline or latents in a folder; None if it holds neither."""
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
    """Raises ValueError for errors that a retry cannot fix. Errors of local files are raised as they are."""
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
