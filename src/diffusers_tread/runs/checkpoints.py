# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Atomic checkpoints on top of Accelerate's `save_state` and `load_state`: either complete or absent.

A checkpoint is a folder `checkpoint-<step>` with Accelerate's files (weights, optimiser, gradient scaler, generators),
`ema.safetensors`, `trainer_state.json` (the training loop's state) and, written last, `manifest.json` with the step,
the branches of the run that led to it, and the size and SHA-256 of every other file. It is written as
`checkpoint-<step>.tmp` and renamed once it is on the disk. With several machines, the output folder must be on a file
system that all of them share.
"""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.training_utils import EMAModel

from ..files import file_sha256, full_disk_explained, read_object, remove, replace_folder, write_json
from .ema import load_ema, whole_weights


MANIFEST, STATE, EMA_WEIGHTS = "manifest.json", "trainer_state.json", "ema.safetensors"
_ON_FULL_DISK = "Free some space and run the same command, which goes on from the last whole checkpoint."

Lineage = tuple[tuple[str, int], ...]
"""The branches a run went through, as pairs of id and first step; the last one is the run's own."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a checkpoint's `manifest.json`."""

    step: int
    """Optimiser steps done."""
    lineage: Lineage
    """Lineage of the run that wrote the checkpoint."""
    files: dict[str, dict[str, Any]]
    """`size` (bytes) and `sha256` of each file, by its name."""

    def is_of(self, lineage: Lineage) -> bool:
        """Whether a run with this lineage wrote this checkpoint or descends from it."""
        shared = len(self.lineage)
        return self.lineage == lineage[:shared] and (shared == len(lineage) or self.step <= lineage[shared][1])


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    *,
    state: dict[str, Any],
    lineage: Lineage = (),
    ema: EMAModel | None = None,
    ema_names: list[str] | None = None,
    total_limit: int | None = None,
) -> Path:
    """Writes `checkpoint-<step>`; all processes call it together.

    Args:
        accelerator: Has prepared the model and the optimiser.
        output_dir: Folder for the checkpoints.
        step: Optimiser steps done.
        state: State of the training loop to restore later, as JSON; the same on all processes.
        lineage: The run's lineage.
        ema: Averaged weights to save.
        ema_names: Their names, in the order of the parameters.
        total_limit: Number of this run's checkpoints to keep; the oldest ones are deleted once this one is complete.
            None keeps all.

    Returns:
        The folder.

    Raises:
        OSError: The disk is full. The unfinished checkpoint is removed.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    folder = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        remove(folder)
    accelerator.wait_for_everyone()

    def write() -> None:
        accelerator.save_state(str(folder))
        weights = None if ema is None else whole_weights(ema.shadow_params, ema_names, device="cpu")
        if accelerator.is_main_process:
            if ema is not None:
                safetensors.torch.save_file(weights, folder / EMA_WEIGHTS)
            more = {} if ema is None else {"ema_optimization_step": ema.optimization_step}
            (folder / STATE).write_text(json.dumps(state | more, indent=2))

    def seal() -> None:
        if accelerator.is_main_process:
            _seal(folder, step=step, lineage=lineage)
            replace_folder(folder, final)

    # Write the contents, rename the folder, and only then delete older checkpoints.
    _write_together(accelerator, write, folder)
    _write_together(accelerator, seal, folder)
    if accelerator.is_main_process:
        rotate_checkpoints(output_dir, total_limit=total_limit, step=step, lineage=lineage)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, *, ema: EMAModel | None = None, ema_names: list[str] | None = None
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote; all processes call it together.

    Returns:
        The training loop's state.

    Raises:
        ValueError: `ema` is given, but the checkpoint has no averaged weights.
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
    """Reads the training loop's state from a complete checkpoint."""
    return json.loads((Path(checkpoint) / STATE).read_text())


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
        ValueError: The manifest is missing or damaged.
    """
    content = read_object(checkpoint / MANIFEST)
    try:
        lineage = tuple((branch, start) for branch, start in content["lineage"])
        manifest = Manifest(step=content["step"], lineage=lineage, files=dict(content["files"]))
        is_sound = isinstance(manifest.step, int) and STATE in manifest.files
        is_sound &= all(isinstance(branch, str) and isinstance(start, int) for branch, start in lineage)
        is_sound &= all(isinstance(entry["size"], int) and entry["sha256"] for entry in manifest.files.values())
        is_sound &= all(is_inside(name) for name in manifest.files)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Expected the manifest of a checkpoint in {checkpoint}, got another content.") from error
    if not is_sound:
        raise ValueError(f"Expected the manifest of a checkpoint in {checkpoint}, got another content.")
    return manifest


def is_inside(name: str) -> bool:
    """Whether a file name from a manifest points inside the checkpoint's folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def verify_checkpoint(checkpoint: Path, *, checksums: bool = True) -> Manifest:
    """Compares every file with the manifest.

    Args:
        checkpoint: The folder.
        checksums: Whether to compare the SHA-256 of every file; False compares sizes only.

    Returns:
        The manifest.

    Raises:
        ValueError: The manifest or a file is missing or differs; the message names the first one.
    """
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"Expected a whole checkpoint, got {checkpoint} without a readable {MANIFEST}: {error}"
        ) from error
    for name, expected in manifest.files.items():
        path = checkpoint / name
        is_same = path.is_file() and path.stat().st_size == expected["size"]
        if not is_same or (checksums and file_sha256(path) != expected["sha256"]):
            raise ValueError(f"Expected {name} as it was written, got a missing or damaged file in {checkpoint}.")
    return manifest


def find_checkpoint(output_dir: str | Path, which: str = "latest", *, lineage: Lineage = ()) -> Path | None:
    """Finds the checkpoint to resume from. Call it in one process only and broadcast the result.

    Args:
        output_dir: Folder with checkpoints. Half-written ones (`*.tmp`) that a killed run left are deleted.
        which: "latest" for the newest complete checkpoint that this branch of the run wrote; damaged ones and those of
            other branches are skipped with a warning. Or the path of a checkpoint, or its name in `output_dir`.
        lineage: Lineage of the run, for "latest".

    Returns:
        The folder, or None if "latest" finds no complete checkpoint.

    Raises:
        ValueError: The named checkpoint is missing or damaged.
    """
    # Delete what a killed run left half-written.
    output_dir = Path(output_dir)
    for half in output_dir.glob("checkpoint-*.tmp"):
        if re.fullmatch(r"checkpoint-\d+(\.old)?\.tmp", half.name):
            logger.warning(f"Deleting {half}, which was never finished.")
            remove(half)

    # A named checkpoint.
    if which != "latest":
        checkpoint = output_dir / which if (output_dir / which).is_dir() else Path(which)
        if not checkpoint.is_dir():
            raise ValueError(f"Expected a checkpoint folder or 'latest', got {which!r}, which does not exist.")
        verify_checkpoint(checkpoint)
        return checkpoint

    # The newest complete one of this branch.
    found, others = None, []
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            manifest = read_manifest(checkpoint)
            if checkpoint.name != f"checkpoint-{manifest.step}":
                raise ValueError(f"{checkpoint} is of step {manifest.step}.")
            if not manifest.is_of(lineage):
                others.append(checkpoint.name)
            elif manifest.lineage == lineage:
                verify_checkpoint(checkpoint)
                found = checkpoint
                break
        except ValueError as error:
            logger.warning(f"Skipping a damaged checkpoint: {error}")
    if others:
        logger.warning(f"Skipping {others} in {output_dir}, which are not of this run but of one before it.")
    return found


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def rotate_checkpoints(output_dir: str | Path, *, total_limit: int | None, step: int, lineage: Lineage = ()) -> None:
    """Deletes this run's oldest checkpoints until `total_limit` are left.

    Only complete checkpoints up to the current step are counted and deleted. Damaged ones, those of other runs and
    those of later steps stay.

    Args:
        output_dir: Folder with checkpoints.
        total_limit: Number of checkpoints to keep, at least 1; None keeps all.
        step: The current step.
        lineage: The run's lineage.
    """
    if total_limit is None:
        return
    counted = []
    for checkpoint in list_checkpoints(output_dir):
        try:
            manifest = verify_checkpoint(checkpoint, checksums=False)
        except ValueError:  # already reported when the run was resumed
            continue
        if manifest.is_of(lineage) and manifest.step <= step:
            counted.append(checkpoint)
    for checkpoint in counted[: -max(total_limit, 1)]:
        # Rename first, so that a run killed in between leaves no half-deleted checkpoint under a valid name.
        remove(checkpoint.rename(checkpoint.with_name(checkpoint.name + ".old.tmp")))


def _write_together(accelerator: Accelerator, work: Callable[[], None], folder: Path) -> None:
    """Calls `work` in each process. If it fails in one, all processes raise and the half-written folder is deleted."""
    problem = None
    try:
        with full_disk_explained(folder.with_suffix(""), remedy=_ON_FULL_DISK):
            work()
    except BaseException as error:
        # Raise at once, without telling the other processes: they do not wait for one that is being stopped, and
        # under FSDP they may be inside collectives of `save_state`.
        if not isinstance(error, Exception) or accelerator.distributed_type == DistributedType.FSDP:
            remove(folder)
            raise
        problem = error
    told = problem and (getattr(problem, "errno", None), getattr(problem, "strerror", None) or str(problem))
    if problems := [one for one in gather_object([told]) if one is not None]:
        if accelerator.is_main_process:
            remove(folder)
        accelerator.wait_for_everyone()
        number, message = problems[0]
        raise problem or (RuntimeError(message) if number is None else OSError(number, message))


def _seal(folder: Path, *, step: int, lineage: Lineage) -> None:
    """Writes the manifest, which lists all files in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    write_json(folder / MANIFEST, {"step": step, "lineage": lineage, "files": files})


def settle_buckets(
    model: torch.nn.Module, latents_shape: Sequence[int], device: torch.device, conditions: dict[str, Any]
) -> None:
    """Makes DDP rebuild its gradient buckets, as after a first backward pass, before a checkpoint is loaded.

    With more than two processes, the rounding of gradient sums depends on the buckets: without this, a resumed run
    would round its first step differently.

    Args:
        model: The model as Accelerate prepared it; without DDP nothing happens.
        latents_shape: Shape [C, H, W] of the latents it is trained on.
        device: The model's device.
        conditions: The model's conditions for one sample.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        latents, zero = torch.zeros(1, *latents_shape, device=device), torch.zeros(1, device=device)
        output = model(latents, zero, **conditions)
        projected = getattr(output, "projected_states", None) or {}
        sum((one.sum() for one in projected.values()), output.sample.sum()).backward()
        model.zero_grad()
