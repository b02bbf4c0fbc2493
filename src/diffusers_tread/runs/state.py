# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The record of a run in its folder: its settings, where it began, and the files that it wrote."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_object, write_json
from .checkpoints import Lineage, is_inside


STATE_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of `run.json`."""

    settings: dict[str, Any]
    """Everything the run depends on."""
    lineage: Lineage
    """The branches the run went through. Going back to an earlier checkpoint begins a new branch."""
    origin: str | None = None
    """The checkpoint that the last branch began at; None if it began at step 0."""
    written: tuple[str, ...] = ()
    """Files that the run wrote, relative to the folder, sorted."""

    @property
    def first_step(self) -> int:
        """The step that the last branch began at."""
        return self.lineage[-1][1]

    def save(self, folder: Path) -> None:
        """Writes the file atomically."""
        write_json(folder / STATE_FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """Reads the file.

        Raises:
            ValueError: It is missing or damaged.
        """
        content = read_object(folder / STATE_FILE)
        try:
            lineage = tuple((branch, start) for branch, start in content["lineage"])
            state = cls(**content | {"lineage": lineage, "written": tuple(content["written"])})
            is_sound = isinstance(state.settings, dict) and len(lineage) > 0
            is_sound &= all(isinstance(branch, str) and isinstance(start, int) for branch, start in lineage)
            is_sound &= isinstance(state.origin, str | None) and all(is_inside(name) for name in state.written)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected what a run keeps in {folder / STATE_FILE}, got another content.") from error
        if not is_sound:
            raise ValueError(f"Expected what a run keeps in {folder / STATE_FILE}, got another content.")
        return state
