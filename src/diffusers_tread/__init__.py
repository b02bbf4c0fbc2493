# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from typing import TYPE_CHECKING, Any

from .guiders import Branch, BranchGuidance, PathDropGuidance, RatioSchedule, SparseGuidance, register_guider
from .hooks import (
    BlockSpec,
    ModelSpec,
    Window,
    apply_token_routing,
    check_token_routing,
    compile_blocks,
    register_block_spec,
    register_model_spec,
    remove_token_routing,
)
from .models import TREADMamba2DModel, TREADRWKV2DModel, TREADTransformer2DModel, register_denoiser
from .objectives import (
    AlignmentLoss,
    DenoiserWithHeads,
    EDMObjective,
    EpsilonObjective,
    FlowMatchingObjective,
    ForwardRecord,
    JiTObjective,
    LossTerm,
    Objective,
    ReconstructionLoss,
    register_loss_term,
    register_objective,
)
from .quiet import quieten_diffusers
from .routing import RoutedStack, RoutingCall, TokenRoute, TokenRouter, default_route, get_token_router, token_routing
from .schedulers import EDMHeunScheduler, FlowSDEScheduler
from .version import __version__


if TYPE_CHECKING:
    from .pipelines import CfgLayout, GuidedPipeline, TREADPipeline, register_pipeline_layout


quieten_diffusers()

__all__ = [
    "AlignmentLoss",
    "BlockSpec",
    "Branch",
    "BranchGuidance",
    "CfgLayout",
    "DenoiserWithHeads",
    "EDMHeunScheduler",
    "EDMObjective",
    "EpsilonObjective",
    "FlowMatchingObjective",
    "FlowSDEScheduler",
    "ForwardRecord",
    "GuidedPipeline",
    "JiTObjective",
    "LossTerm",
    "ModelSpec",
    "Objective",
    "PathDropGuidance",
    "RatioSchedule",
    "ReconstructionLoss",
    "RoutedStack",
    "RoutingCall",
    "SparseGuidance",
    "TREADMamba2DModel",
    "TREADPipeline",
    "TREADRWKV2DModel",
    "TREADTransformer2DModel",
    "TokenRoute",
    "TokenRouter",
    "Window",
    "apply_token_routing",
    "check_token_routing",
    "compile_blocks",
    "default_route",
    "get_token_router",
    "register_block_spec",
    "register_denoiser",
    "register_guider",
    "register_loss_term",
    "register_model_spec",
    "register_objective",
    "register_pipeline_layout",
    "remove_token_routing",
    "token_routing",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # On first use: diffusers' pipelines import its autoencoders, UNets and transformers, which training does without.
    if name in ("CfgLayout", "GuidedPipeline", "TREADPipeline", "register_pipeline_layout"):
        from . import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
