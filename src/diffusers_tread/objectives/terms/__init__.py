# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .alignment import AlignmentLoss
from .base import ForwardRecord, LossTerm
from .heads import DenoiserWithHeads, GridHead
from .reconstruction import ReconstructionLoss
from .registry import LOSS_TERMS, register_loss_term


__all__ = [
    "AlignmentLoss",
    "DenoiserWithHeads",
    "ForwardRecord",
    "GridHead",
    "LOSS_TERMS",
    "LossTerm",
    "ReconstructionLoss",
    "register_loss_term",
]
