# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Loads scorers from a file of the user, which is executed."""

import dataclasses
import runpy
from pathlib import Path

from ...files import file_sha256
from .registry import SCORERS
from .scorer import Scorer


_LOADED: dict[str, dict[str, Scorer]] = {}  # by the hash of the file, which is executed once per process


def load_scorer_file(path: str | Path) -> dict[str, Scorer]:
    """Executes a Python file that calls `register_scorer`. Never use it for a file that you do not trust.

    The hash of the file is added to the scorers' descriptions, so that results say which code made them.

    Args:
        path: The file.

    Returns:
        The scorers that the file registered, by name.

    Raises:
        ValueError: There is no such file, or it adds no scorer.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"Expected a Python file with scorers, got {path}. Check the path.")
    digest = file_sha256(path)
    if digest not in _LOADED:
        before = set(SCORERS)
        runpy.run_path(str(path))
        added = {name: _with_hash(SCORERS[name], digest) for name in SCORERS if name not in before}
        if not added:
            raise ValueError(f"Expected a file that adds scorers, got {path}. Call register_scorer(name, function).")
        _LOADED[digest] = added
    SCORERS.update(_LOADED[digest])
    return _LOADED[digest]


def _with_hash(scorer: Scorer, digest: str) -> Scorer:
    def load(**options):
        score, description = scorer.load(**options)
        return score, {**description, "file_sha256": digest}

    return dataclasses.replace(scorer, load=load)
