# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loss terms by name."""

from ...registry import add_entry
from .alignment import AlignmentLoss
from .base import LossTerm
from .reconstruction import ReconstructionLoss


LOSS_TERMS: dict[str, type[LossTerm]] = {}


def register_loss_term(name: str, term: type[LossTerm]) -> None:
    """Registers a term under a name, for `--loss_terms` of the training script.

    Raises:
        ValueError: Another term has this name.
    """
    add_entry(LOSS_TERMS, name, term)


register_loss_term("reconstruction", ReconstructionLoss)
register_loss_term("alignment", AlignmentLoss)
