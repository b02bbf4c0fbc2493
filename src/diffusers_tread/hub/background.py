# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Pushes to the Hub in the background of a running training."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline

from .export import export_for_hub
from .model_card import CardDetails
from .upload import upload_folder


logger = logging.getLogger(__name__)


class BackgroundPush:
    """Writes pipelines to a folder and uploads it in a thread, one at a time.

    A failure only logs a warning: neither the run nor its files are affected.

    Args:
        repo_id: "organisation/name".
        folder: Folder for the exported pipeline; each push replaces it.
        private: Whether a new repository is private; None for the owner's default.
        export: Function that writes a pipeline to the folder, with the signature of `export_for_hub`.
    """

    def __init__(
        self,
        repo_id: str,
        folder: str | Path,
        *,
        private: bool | None = None,
        export: Callable[..., Path] = export_for_hub,
    ):
        self.repo_id, self.folder, self.private, self.export = repo_id, Path(folder), private, export
        self._thread: threading.Thread | None = None

    def start(self, pipeline: DiffusionPipeline, *, commit_message: str, card: CardDetails | None = None) -> None:
        """Exports the pipeline now and uploads it in the background; does nothing while an earlier upload runs."""
        if self._thread is not None and self._thread.is_alive():
            logger.warning(f"Left out the push {commit_message!r}: the one before is not finished.")
            return
        try:
            self.export(pipeline, self.folder, repo_id=self.repo_id, card=card)
        except (OSError, ValueError) as error:
            logger.warning(f"Failed to export {commit_message!r} for {self.repo_id}: {error}")
            return
        self._thread = threading.Thread(target=self._upload, args=(commit_message,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until no upload runs."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, commit_message: str) -> None:
        try:
            url = upload_folder(self.folder, repo_id=self.repo_id, private=self.private, commit_message=commit_message)
            logger.info(f"Pushed {commit_message!r} to {url}.")
        except (OSError, ValueError) as error:  # ConnectionError is an OSError
            logger.warning(
                f"Failed to push {commit_message!r}: {error} To push it later: "
                f"upload_folder({str(self.folder)!r}, repo_id={self.repo_id!r}) of diffusers_tread.hub."
            )
