# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The guiders by class name: those that a repository on the Hub may contain and that are loaded with our code."""

from diffusers import BaseGuidance

from ..registry import add_entry
from .path_drop_guidance import PathDropGuidance
from .sparse_guidance import SparseGuidance


GUIDERS: dict[str, type[BaseGuidance]] = {}


def register_guider(guider: type[BaseGuidance]) -> None:
    """Lets `TREADPipeline` save, export and load a guider of your own.

    Raises:
        ValueError: Another guider has this name.
    """
    add_entry(GUIDERS, guider.__name__, guider)


register_guider(SparseGuidance)
register_guider(PathDropGuidance)
