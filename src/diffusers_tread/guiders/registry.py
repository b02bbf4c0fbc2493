# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The guiders of this package by class name: what a repository on the Hub may hold and is loaded with our code."""

from diffusers import BaseGuidance

from ..registry import add_entry
from .path_drop_guidance import PathDropGuidance
from .sparse_guidance import SparseGuidance


GUIDERS: dict[str, type[BaseGuidance]] = {}


def register_guider(guider: type[BaseGuidance]) -> None:
    """Makes `TREADPipeline` save, export and load a guider of your own.

    Raises:
        ValueError: Another guider is called so.
    """
    add_entry(GUIDERS, guider.__name__, guider)


register_guider(SparseGuidance)
register_guider(PathDropGuidance)
