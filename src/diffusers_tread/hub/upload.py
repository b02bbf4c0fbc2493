# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Uploads that an unreliable connection delays but does not break."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


# Requests' errors are OSErrors, httpx's derive from the class that HfHubHTTPError has as a base where httpx is used;
# huggingface_hub and hf_xet make RuntimeErrors of some.
_UPLOAD_ERRORS = (OSError, RuntimeError, *HfHubHTTPError.__bases__)

logger = logging.getLogger(__name__)


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
) -> str:
    """Uploads a folder to the Hub, making the repository if there is none.

    Only what is new is sent: files that the repository has are skipped, and so are large ones that an earlier, broken
    upload has sent. What becomes of the folder's files in the repository that are no longer in the folder: they stay.

    Args:
        folder: Its content becomes the repository's.
        repo_id: "name" or "organisation/name".
        repo_type: "model" or "dataset".
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch to upload to, made if missing; None for the default one.
        token: For the Hub; None for that of `hf auth login` or HF_TOKEN.
        ignore_patterns: Files to leave out, with wildcards.
        commit_message: First line of the commit.
        max_retries: Further tries if the Hub cannot be reached, 1, 2, 4, ... seconds apart; huggingface_hub's own
            come on top.

    Returns:
        The repository's address.

    Raises:
        ValueError: There is nothing to upload, or the Hub refuses: the token, the name, the content.
        ConnectionError: The Hub could not be reached. The same call later goes on.
    """
    folder = Path(folder)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"Expected a folder with files to upload to {repo_id}, got {folder}.")

    api = HfApi(token=token)
    for attempt in range(max_retries + 1):
        try:
            url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(url.repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                repo_type=repo_type,
                revision=revision,
                ignore_patterns=list(ignore_patterns),
                commit_message=commit_message,
            )
            return str(url)
        except _UPLOAD_ERRORS as error:
            _raise_if_final(error, folder, repo_id, has_token=bool(token or get_token()))
            if attempt == max_retries:
                raise ConnectionError(
                    f"Expected to upload {folder} to {repo_id}, got no connection to the Hub in {max_retries + 1} "
                    f"tries ({error}). Nothing in {folder} is lost: the same command later sends what is missing."
                ) from error
            logger.warning(f"The upload to {repo_id} broke off ({error}). Trying again in {2**attempt} s.")
            time.sleep(2**attempt)


def _raise_if_final(error: BaseException, folder: Path, repo_id: str, *, has_token: bool) -> None:
    """Raises a ValueError for what another try cannot mend; local files that cannot be read are raised as they are."""
    safe = f"Nothing in {folder} is lost: the same command uploads it."
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename is not None:
            raise error
        if isinstance(cause, OfflineModeIsEnabled):
            raise ValueError(f"Expected to upload to {repo_id}, got HF_HUB_OFFLINE=1. Unset it. {safe}") from error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 500
        if status in (401, 403):
            raise ValueError(
                f"Expected a token that may write to {repo_id}, got {'one that may not' if has_token else 'none'} "
                f"({cause}). Run `hf auth login` or set HF_TOKEN. {safe}"
            ) from error
        if status < 500 and status not in (408, 412, 429):
            raise ValueError(f"Expected the Hub to accept {folder} as {repo_id}, got {cause}. {safe}") from error
        cause = cause.__cause__
