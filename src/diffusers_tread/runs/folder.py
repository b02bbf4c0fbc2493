# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Decides whether an output folder starts a new run, resumes its run, or belongs to a run that must be kept."""

import dataclasses
import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..claims import LOCK, claim
from ..distributed import on_main_process
from ..files import remove, write_json
from ..settings import list_changes
from .checkpoints import MANIFEST, find_checkpoint, list_checkpoints, read_manifest, read_state, verify_checkpoint
from .state import STATE_FILE, RunState


SETTINGS, PIPELINE = "train_config.json", "pipeline"

logger = logging.getLogger(__name__)


class RunFolder:
    """An output folder that a running run has claimed, made by `open_run_folder`."""

    def __init__(self, folder: Path, state: RunState, checkpoint: Path | None, others: frozenset[str]):
        self.folder, self.checkpoint = folder, checkpoint
        self._state, self._others = state, others

    @property
    def lineage(self):
        """The branches the run went through, for `save_checkpoint`."""
        return self._state.lineage

    def record(self, *paths: str | Path) -> None:
        """Records what the run has written, so that `overwrite` may delete it; only the main process acts.

        Args:
            *paths: Files or folders in the run's folder. Files from before the run are left out.
        """
        if not PartialState().is_main_process:
            return
        names = {name for path in paths for name in _files(self.folder, self.folder / path)}
        names = names - self._others | set(self._state.written)
        written = tuple(sorted(name for name in names if (self.folder / name).exists()))
        if written != self._state.written:
            self._state = dataclasses.replace(self._state, written=written)
            self._state.save(self.folder)


@contextmanager
def open_run_folder(
    output_dir: str | Path,
    *,
    settings: dict[str, Any],
    total_steps: int,
    free_settings: Iterable[str] = (),
    fixed_settings: Iterable[str] = (),
    results: Iterable[str] = (PIPELINE,),
    resume_from_checkpoint: str | None = None,
    overwrite: bool = False,
) -> Iterator[RunFolder]:
    """Claims the output folder for a run and finds the checkpoint it goes on from; all processes call it together.

    A new or empty folder starts a run. A folder that holds a run with the same settings resumes it from its latest
    complete checkpoint, so the same command finishes a killed run. If `resume_from_checkpoint` is given, the settings
    may differ and replace those of the folder. A run that goes on from a named checkpoint, or with other settings,
    begins a new branch: later checkpoints of the old branch no longer belong to it.

    Args:
        output_dir: The folder; created if missing.
        settings: Everything the run depends on, as JSON. They are written to `train_config.json`; checkpoints keep
            them in their state under the name `settings`.
        total_steps: Optimiser steps of the whole run.
        free_settings: Keys of `settings` that do not change the weights and may differ.
        fixed_settings: Keys of `settings` that must be the same to resume a checkpoint, such as the model's.
        results: Files or folders that a finished run leaves in the folder.
        resume_from_checkpoint: None, "latest", or a checkpoint's path or name.
        overwrite: Whether to delete the files that an earlier run wrote in the folder, according to its manifests.

    Yields:
        The folder, whose `checkpoint` is complete, or None to start from step 0.

    Raises:
        ValueError: Another process is using the folder; it holds another run, or files of unknown origin; the
            checkpoint is missing, damaged or has other fixed settings; or the settings differ and no step is left to
            train with them.
    """
    settings = json.loads(json.dumps(settings))
    free_settings, fixed_settings, results = list(free_settings), list(fixed_settings), list(results)

    def settle(folder: Path) -> tuple[RunState, Path | None, frozenset[str]]:
        # What the folder holds.
        if overwrite:
            _clear(folder, results)
        before = _read_before(folder, resume_from_checkpoint, results)
        changes = [] if before is None else list_changes(before.settings, settings, free=free_settings)
        if changes and resume_from_checkpoint is None:
            raise ValueError(
                f"Expected an empty output folder or one of this very run, got {folder}, which holds a run with other "
                f"settings ({'; '.join(changes)}). Use another --output_dir, --overwrite_output_dir to start afresh, "
                "or --resume_from_checkpoint latest to go on with the new settings."
            )
        checkpoint = _find(folder, before, resume_from_checkpoint)
        if checkpoint is not None:
            _check_checkpoint(checkpoint, settings, fixed_settings, free_settings, total_steps)

        # Write the state before the settings: settings without it would look like another program's file.
        is_same = before is not None and resume_from_checkpoint in (None, "latest") and not changes
        state = dataclasses.replace(before, settings=settings) if is_same else _branch(before, settings, checkpoint)
        others = frozenset(_files(folder, folder)) - set(state.written) - {SETTINGS, STATE_FILE}
        state = dataclasses.replace(state, written=tuple(sorted({*state.written, SETTINGS})))
        if before is None or state.lineage != before.lineage:
            state = _leave_branch(folder, before, state, changes, results)
        state.save(folder)
        write_json(folder / SETTINGS, settings)
        return state, checkpoint, others

    with claim(output_dir) as folder:
        yield RunFolder(folder, *on_main_process(lambda: settle(folder)))


def _read_before(folder: Path, resume_from_checkpoint: str | None, results: list[str]) -> RunState | None:
    """The state of the run that the folder holds; None for a new folder."""
    if (folder / STATE_FILE).exists():
        try:
            return RunState.load(folder)
        except ValueError as error:
            if resume_from_checkpoint in (None, "latest"):
                names = [checkpoint.name for checkpoint in list_checkpoints(folder)]
                raise ValueError(
                    f"{error} Nobody can tell which of the checkpoints {names} is the run's latest: name one by "
                    "--resume_from_checkpoint, or use another --output_dir."
                ) from error
            logger.warning(f"{error} Going on without it from {resume_from_checkpoint}.")
            return None
    if found := [path.name for path in _replaced(folder, results)]:
        raise ValueError(
            f"Expected an empty folder or one of this run, got {folder} with {found[:3]} but no {STATE_FILE}, which "
            "tells whose they are. Use another --output_dir, or take them away."
        )
    return None


def _find(folder: Path, before: RunState | None, which: str | None) -> Path | None:
    """The checkpoint to go on from; None to start from step 0."""
    if which not in (None, "latest"):
        return find_checkpoint(folder, which)
    if before is None:
        return None
    checkpoint = find_checkpoint(folder, lineage=before.lineage)
    if checkpoint is not None:
        return checkpoint

    # Else the checkpoint that the branch began at.
    if before.origin is None:
        if there := [path.name for path in list_checkpoints(folder)]:
            logger.warning(f"None of {there} in {folder} can be resumed. Starting from step 0.")
        return None
    for origin in (folder / Path(before.origin).name, Path(before.origin)):
        try:
            manifest = verify_checkpoint(origin)
        except ValueError:
            continue
        if manifest.step == before.first_step and manifest.lineage == before.lineage[:-1]:
            return origin
    raise ValueError(
        f"Expected a whole checkpoint of the run in {folder}, got none, nor {before.origin}, which it began at. Name "
        "another one by --resume_from_checkpoint, or start afresh with --overwrite_output_dir."
    )


def _check_checkpoint(
    checkpoint: Path,
    settings: dict[str, Any],
    fixed_settings: list[str],
    free_settings: list[str],
    total_steps: int,
) -> None:
    before, step = read_state(checkpoint).get("settings", {}), read_manifest(checkpoint).step
    for key in fixed_settings:
        if list_changes({key: before.get(key)}, {key: settings.get(key)}):  # a new setting that is None is the same
            raise ValueError(
                f"Expected the {key} settings of {checkpoint}, {before.get(key)}, got {settings.get(key)}. Restore "
                "them or use another --output_dir."
            )
    # A finished run must not be passed off as one with other settings.
    changes = list_changes(before, settings, free=free_settings)
    if step > total_steps or (step == total_steps and changes):
        raise ValueError(
            f"Expected a checkpoint that leaves a step to train, got {checkpoint} of step {step} for a run of "
            f"{total_steps} steps with other settings ({'; '.join(changes)}). Name an earlier one by "
            "--resume_from_checkpoint, raise --max_train_steps, or use another --output_dir."
        )


def _branch(before: RunState | None, settings: dict[str, Any], checkpoint: Path | None) -> RunState:
    """The state of a new branch, which begins at step 0 or at a checkpoint."""
    written, branch = () if before is None else before.written, secrets.token_hex(4)
    if checkpoint is None:
        return RunState(settings=settings, lineage=((branch, 0),), written=written)
    manifest = read_manifest(checkpoint)
    lineage = (*manifest.lineage, (branch, manifest.step))
    return RunState(settings=settings, lineage=lineage, origin=str(checkpoint.resolve()), written=written)


def _leave_branch(
    folder: Path, before: RunState | None, state: RunState, changes: list[str], results: list[str]
) -> RunState:
    """Warns about what the old branch leaves behind, and renames its results."""
    step, written = state.first_step, set(state.written)
    if changes:
        logger.warning(f"Going on with other settings than before: {'; '.join(changes)}.")
    if later := [path.name for path in list_checkpoints(folder) if int(path.name.split("-")[1]) > step]:
        logger.warning(
            f"Going on from step {step}. {later} in {folder} are no longer this run's, which replaces them when it "
            "comes to their steps."
        )
    for name in results:
        if (folder / name).exists():
            branch = f"before-{state.lineage[-1][0]}" if before is None else before.lineage[-1][0]
            kept = Path(name).stem + f"-{branch}" + Path(name).suffix
            remove(folder / kept)
            (folder / name).rename(folder / kept)
            logger.warning(f"Renamed {name} of the run before to {folder / kept}.")
            ours = {file for file in written if Path(file).parts[0] == name}
            written = written - ours | {kept + file.removeprefix(name) for file in ours}
    return dataclasses.replace(state, written=tuple(sorted(written)))


def _replaced(folder: Path, results: list[str]) -> list[Path]:
    """The existing checkpoints and results, each of which a run replaces as a whole."""
    return [*list_checkpoints(folder), *(folder / name for name in results if (folder / name).exists())]


def _files(folder: Path, path: Path) -> set[str]:
    """The names of a file, or of all files below a folder, relative to the run's folder."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return {one.relative_to(folder).as_posix() for one in paths if one.is_file() or one.is_symlink()} - {LOCK}


def _clear(folder: Path, results: list[str]) -> None:
    """Deletes the files that manifests name, and folders that are empty afterwards.

    Raises:
        ValueError: Other files are in the way of folders that the new run writes. Nothing is deleted then.
    """
    # Files that a run wrote.
    names = set()
    if (folder / STATE_FILE).exists():
        names.add(STATE_FILE)
        try:
            names.update(RunState.load(folder).written)
        except ValueError as error:
            logger.warning(f"{error} Only checkpoints with manifests are deleted.")
    for checkpoint in list_checkpoints(folder):
        try:
            files = [*read_manifest(checkpoint).files, MANIFEST]
        except ValueError as error:
            logger.warning(f"{error} Only the files of it that {STATE_FILE} names are deleted.")
            continue
        names.update(f"{checkpoint.name}/{name}" for name in files)
    root = folder.resolve()
    names = {name for name in names if (folder / name).parent.resolve().is_relative_to(root)}

    # Other files must not be in the way.
    replaced = _replaced(folder, results)
    if strange := sorted(name for path in replaced for name in _files(folder, path) - names):
        raise ValueError(
            f"Expected only files that a run's manifest names where --overwrite_output_dir makes room, got "
            f"{strange[:3]} in {folder}. Take them away, or use another --output_dir."
        )

    # Delete files, then empty folders from the innermost.
    for name in names:
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in names for parent in (folder / name).parents if folder in parent.parents}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        if parent.is_dir() and not parent.is_symlink() and not any(parent.iterdir()):
            parent.rmdir()
    if left := sorted(_files(folder, folder)):
        logger.warning(f"Left in {folder}, because no manifest says that a run wrote them: {left[:10]}.")
