# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Who owns an output folder: a new run, the same run resumed, or another run that must not be overwritten."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..distributed import on_main_process
from ..files import write_json
from .checkpoints import find_checkpoint, list_checkpoints, read_state


SETTINGS = "train_config.json"
# What a run writes into its folder, for `overwrite`.
_WRITTEN = ("checkpoint-*", "samples", "logs", "eval", "metrics.json", "hub", "hub*.tmp")
_WRITTEN += ("pipeline", "pipeline*.tmp", SETTINGS)

logger = logging.getLogger(__name__)


def open_run_folder(
    output_dir: str | Path,
    *,
    settings: dict[str, Any],
    free_settings: Iterable[str] = (),
    fixed_settings: Iterable[str] = (),
    resume_from_checkpoint: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Claims the output folder for a run and finds the checkpoint it goes on from; all processes call it together.

    A new or empty folder starts a run. A folder that holds this very run resumes from its latest whole checkpoint, so
    the same command finishes a killed run. Asked for by name ("latest" or a path), a checkpoint is also used for a run
    with other settings, which then become the folder's.

    Args:
        output_dir: The folder; made if missing.
        settings: Everything the run depends on, JSON. Written to `train_config.json`; checkpoints keep them in their
            state under the name `settings`.
        free_settings: Keys of `settings` that do not change the weights and may differ.
        fixed_settings: Keys of `settings` that no checkpoint can be resumed without, such as the model's.
        resume_from_checkpoint: None, "latest", or a checkpoint's path or name.
        overwrite: Whether to delete what an earlier run left in the folder.

    Returns:
        A whole checkpoint, or None to start from step 0.

    Raises:
        ValueError: The folder holds another run; the checkpoint is missing, damaged or has other fixed settings.
    """
    output_dir = Path(output_dir)
    settings = json.loads(json.dumps(settings))

    def claim() -> Path | None:
        if overwrite:
            _clear(output_dir)
        _check_owner(output_dir, settings, set(free_settings), resuming=resume_from_checkpoint is not None)
        checkpoint = find_checkpoint(output_dir, resume_from_checkpoint or "latest")
        if checkpoint is not None:
            _check_fixed(checkpoint, settings, fixed_settings)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SETTINGS, settings)
        return checkpoint

    return on_main_process(claim)


def _check_owner(output_dir: Path, settings: dict[str, Any], free_settings: set[str], *, resuming: bool) -> None:
    if not (output_dir / SETTINGS).exists():
        if list_checkpoints(output_dir):
            raise ValueError(
                f"Expected an empty folder or one of this run, got {output_dir} with checkpoints but no {SETTINGS}. "
                "Use another --output_dir or --overwrite_output_dir."
            )
        return
    before = json.loads((output_dir / SETTINGS).read_text())
    changes = [
        f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in sorted((set(before) | set(settings)) - free_settings)
        if before.get(key) != settings.get(key)
    ]
    if changes and not resuming:
        raise ValueError(
            f"Expected an empty output folder or one of this very run, got {output_dir}, which holds a run with other "
            f"settings ({'; '.join(changes)}). Use another --output_dir, --overwrite_output_dir to start afresh, or "
            "--resume_from_checkpoint latest to go on with the new settings."
        )
    if changes:
        logger.warning(f"Going on with other settings than before: {'; '.join(changes)}.")


def _check_fixed(checkpoint: Path, settings: dict[str, Any], fixed_settings: Iterable[str]) -> None:
    before = read_state(checkpoint)["settings"]
    for key in fixed_settings:
        if before[key] != settings[key]:
            raise ValueError(
                f"Expected the {key} settings of {checkpoint}, {before[key]}, got {settings[key]}. Restore them or "
                "use another --output_dir."
            )


def _clear(output_dir: Path) -> None:
    for pattern in _WRITTEN:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
