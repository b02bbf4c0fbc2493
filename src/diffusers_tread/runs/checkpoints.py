# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are there whole or not at all, on top of Accelerate's `save_state` and `load_state`.

A checkpoint is a folder `checkpoint-<step>` with Accelerate's files (weights, optimiser, gradient scaler, generators),
`ema.safetensors`, `trainer_state.json` (what the training loop wants back) and, written last, `manifest.json` with the
step, the branches of the run that led to it, and the size and SHA-256 of every other file. It is written as
`checkpoint-<step>.tmp` and renamed when it is on the disk. With several machines the output folder must be one that
all of them see.
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
"""The branches that a run went through, each by its id and the step it began at; the last one is its own."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says of a checkpoint."""

    step: int
    """Optimiser steps done."""
    lineage: Lineage
    """Of the run that wrote it."""
    files: dict[str, dict[str, Any]]
    """`size` and `sha256` by name."""

    def is_of(self, lineage: Lineage) -> bool:
        """Whether a run with this lineage came by this checkpoint, or wrote it."""
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
        accelerator: With the model and optimiser prepared.
        output_dir: Folder for the checkpoints.
        step: Optimiser steps done.
        state: What the training loop wants back, JSON; the same on all processes.
        lineage: Of the run.
        ema: Averaged weights to keep.
        ema_names: Their names, in the order of the parameters.
        total_limit: Checkpoints of this run to keep; its oldest others are deleted once this one is whole. None keeps
            all.

    Returns:
        The folder.

    Raises:
        OSError: The disk is full; nothing is left of the checkpoint.
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

    # Contents, publication, and only then forget older ones.
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


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
        ValueError: There is none, or it is damaged.
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
    """Whether a file's name in a manifest stays in the folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def verify_checkpoint(checkpoint: Path, *, checksums: bool = True) -> Manifest:
    """Compares every file with the manifest.

    Args:
        checkpoint: The folder.
        checksums: Whether to read every file and compare its SHA-256, or to look at its size only.

    Returns:
        The manifest.

    Raises:
        ValueError: Naming the manifest or the first file that is missing or differs.
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
    """The checkpoint to resume from; one process looks and tells the others.

    Args:
        output_dir: Folder with checkpoints. Half-written ones (`*.tmp`) that a killed run left are deleted.
        which: "latest" for the newest whole one that this branch of the run wrote, skipping damaged ones and those of
            others with a warning; or the path of one, or its name in `output_dir`.
        lineage: Of the run that "latest" is asked for.

    Returns:
        The folder, or None if "latest" finds no whole one.

    Raises:
        ValueError: The named checkpoint is missing or damaged.
    """
    output_dir = Path(output_dir)
    for half in output_dir.glob("checkpoint-*.tmp"):
        if re.fullmatch(r"checkpoint-\d+(\.old)?\.tmp", half.name):
            logger.warning(f"Deleting {half}, which was never finished.")
            remove(half)

    if which != "latest":
        checkpoint = output_dir / which if (output_dir / which).is_dir() else Path(which)
        if not checkpoint.is_dir():
            raise ValueError(f"Expected a checkpoint folder or 'latest', got {which!r}, which does not exist.")
        verify_checkpoint(checkpoint)
        return checkpoint

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

    Only whole ones up to the present step count, and only they are deleted; damaged ones, those of other runs and
    those of later steps stay.

    Args:
        output_dir: Folder with checkpoints.
        total_limit: At least 1; None keeps all.
        step: The present step.
        lineage: Of the run.
    """
    if total_limit is None:
        return
    counted = []
    for checkpoint in list_checkpoints(output_dir):
        try:
            manifest = verify_checkpoint(checkpoint, checksums=False)
        except ValueError:  # named when the run was resumed
            continue
        if manifest.is_of(lineage) and manifest.step <= step:
            counted.append(checkpoint)
    for checkpoint in counted[: -max(total_limit, 1)]:
        # Renamed first, so that a run killed in between leaves no half-deleted checkpoint under a valid name.
        remove(checkpoint.rename(checkpoint.with_name(checkpoint.name + ".old.tmp")))


def _write_together(accelerator: Accelerator, work: Callable[[], None], folder: Path) -> None:
    """Calls `work` in each process; if one fails all do, and the half-written folder is gone."""
    problem = None
    try:
        with full_disk_explained(folder.with_suffix(""), remedy=_ON_FULL_DISK):
            work()
    except BaseException as error:
        # Nobody listens to one who is stopped, and FSDP's processes talk to each other while they write.
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
    """Writes the manifest of all files in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    write_json(folder / MANIFEST, {"step": step, "lineage": lineage, "files": files})


def settle_buckets(
    model: torch.nn.Module, latents_shape: Sequence[int], device: torch.device, conditions: dict[str, Any]
) -> None:
    """Lets DDP regroup its gradients, as it does after a first backward, before a checkpoint is loaded.

    Sums over more than two processes depend on the groups: without this a resumed run rounds its first step
    differently.

    Args:
        model: As Accelerate prepared it; nothing happens to one that is not DDP's.
        latents_shape: [C, H, W] that it is trained on.
        device: Its device.
        conditions: What it is told of one sample.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        latents, zero = torch.zeros(1, *latents_shape, device=device), torch.zeros(1, device=device)
        output = model(latents, zero, **conditions)
        projected = getattr(output, "projected_states", None) or {}
        sum((one.sum() for one in projected.values()), output.sample.sum()).backward()
        model.zero_grad()
