# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training objectives (EDM, flow matching, noise prediction, JiT), and terms that are added to the loss."""

from .base import CorruptedLatents, Objective
from .edm import EDMObjective
from .epsilon import EpsilonObjective
from .flow import FlowMatchingObjective
from .jit import JiTObjective
from .registry import OBJECTIVES, find_objective, register_objective
from .terms import (
    LOSS_TERMS,
    AlignmentLoss,
    DenoiserWithHeads,
    ForwardRecord,
    LossTerm,
    ReconstructionLoss,
    register_loss_term,
)


__all__ = [
    "AlignmentLoss",
    "CorruptedLatents",
    "DenoiserWithHeads",
    "EDMObjective",
    "EpsilonObjective",
    "FlowMatchingObjective",
    "JiTObjective",
    "ForwardRecord",
    "LOSS_TERMS",
    "LossTerm",
    "OBJECTIVES",
    "Objective",
    "ReconstructionLoss",
    "find_objective",
    "register_loss_term",
    "register_objective",
]
