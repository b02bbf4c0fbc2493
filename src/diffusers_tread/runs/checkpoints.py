# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are there whole or not at all, on top of Accelerate's `save_state` and `load_state`.

A checkpoint is a folder `checkpoint-<step>` with Accelerate's files (weights, optimiser, gradient scaler, generators),
`ema.safetensors`, `trainer_state.json` (what the training loop wants back) and, written last, `manifest.json` with the
size and SHA-256 of every other file. It is written as `checkpoint-<step>.tmp` and renamed when it is on the disk. With
several machines the output folder must be one that all of them see.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..files import file_sha256, replace_folder, write_json
from .ema import load_ema, whole_weights


MANIFEST, STATE, EMA_WEIGHTS = "manifest.json", "trainer_state.json", "ema.safetensors"

logger = logging.getLogger(__name__)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    *,
    state: dict[str, Any],
    ema: EMAModel | None = None,
    ema_names: list[str] | None = None,
    total_limit: int | None = None,
) -> Path:
    """Writes `checkpoint-<step>`; all processes call it together.

    Args:
        accelerator: With the model and optimiser prepared.
        output_dir: Folder for the checkpoints.
        step: Optimiser steps done.
        state: What the training loop wants back, JSON; the same on all processes.
        ema: Averaged weights to keep.
        ema_names: Their names, in the order of the parameters.
        total_limit: Checkpoints to keep; the oldest others are deleted once this one is whole. None keeps all.

    Returns:
        The folder.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    folder = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()

    # Contents.
    accelerator.save_state(str(folder))
    weights = None if ema is None else whole_weights(ema.shadow_params, ema_names, device="cpu")
    if accelerator.is_main_process:
        if ema is not None:
            safetensors.torch.save_file(weights, folder / EMA_WEIGHTS)
            state = state | {"ema_optimization_step": ema.optimization_step}
        (folder / STATE).write_text(json.dumps(state, indent=2))
    accelerator.wait_for_everyone()

    # Seal, publish, and only then forget older ones.
    if accelerator.is_main_process:
        _seal(folder)
        replace_folder(folder, final)
        rotate_checkpoints(output_dir, total_limit=total_limit)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, *, ema: EMAModel | None = None, ema_names: list[str] | None = None
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote; all processes call it together.

    Returns:
        The training loop's state.

    Raises:
        ValueError: Averaged weights are asked for and the checkpoint has none.
    """
    state = read_state(checkpoint)
    if ema is not None:
        if not (checkpoint / EMA_WEIGHTS).exists():
            raise ValueError(
                f"Expected averaged weights in {checkpoint}, got none. Resume without EMA or start afresh."
            )
        load_ema(ema, checkpoint / EMA_WEIGHTS, ema_names)
        ema.optimization_step = state["ema_optimization_step"]
    accelerator.load_state(str(checkpoint))
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The training loop's state of a whole checkpoint."""
    return json.loads((Path(checkpoint) / STATE).read_text())


def verify_checkpoint(checkpoint: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        ValueError: Naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a whole checkpoint, got {checkpoint} without a readable {MANIFEST}.") from error
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
            raise ValueError(f"Expected {name} as it was written, got a missing or damaged file in {checkpoint}.")


def find_checkpoint(output_dir: str | Path, which: str = "latest") -> Path | None:
    """The checkpoint to resume from; one process looks and tells the others.

    Args:
        output_dir: Folder with checkpoints. Half-written ones (`*.tmp`) that a killed run left are deleted.
        which: "latest" for the newest whole one, skipping damaged ones with a warning; or the path of one, or its name
            in `output_dir`.

    Returns:
        The folder, or None if "latest" finds no whole one.

    Raises:
        ValueError: The named checkpoint is missing or damaged.
    """
    output_dir = Path(output_dir)
    for half in output_dir.glob("checkpoint-*.tmp"):
        logger.warning(f"Deleting {half}, which was never finished.")
        shutil.rmtree(half)

    if which != "latest":
        checkpoint = Path(which) if Path(which).is_dir() else output_dir / which
        if not checkpoint.is_dir():
            raise ValueError(f"Expected a checkpoint folder or 'latest', got {which!r}, which does not exist.")
        verify_checkpoint(checkpoint)
        return checkpoint

    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(checkpoint)
            return checkpoint
        except ValueError as error:
            logger.warning(f"Skipping a damaged checkpoint: {error}")
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def rotate_checkpoints(output_dir: str | Path, *, total_limit: int | None) -> None:
    """Deletes the oldest checkpoints until `total_limit` are left."""
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in checkpoints[: max(len(checkpoints) - total_limit, 0)] if total_limit is not None else []:
        # Renamed first, so that a run killed in between leaves no half-deleted checkpoint under a valid name.
        doomed = checkpoint.rename(checkpoint.with_name(checkpoint.name + ".old.tmp"))
        shutil.rmtree(doomed)


def _seal(folder: Path) -> None:
    """Writes the manifest of all files in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    write_json(folder / MANIFEST, manifest)
