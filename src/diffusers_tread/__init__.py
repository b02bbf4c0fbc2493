# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""TREAD token routing and Sparse Guidance for diffusion transformers, on top of diffusers.

Papers: TREAD (arXiv 2501.04765) and Sparse Guidance (arXiv 2601.01608).

Train a model in which a random half of the tokens skips the middle blocks, then sample from it:

    >>> import torch
    >>> from diffusers_tread import FlowMatchingObjective, SparseGuidance, TREADPipeline, TREADTransformer2DModel
    >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, in_channels=3, num_classes=10, objective="flow")
    >>> objective = FlowMatchingObjective()
    >>> loss = objective.loss(model, torch.randn(2, 3, 8, 8), class_labels=torch.tensor([3, 7])).mean()
    >>> pipe = TREADPipeline(model, objective.scheduler(), guider=SparseGuidance())
    >>> pipe(class_labels=[3, 7], num_inference_steps=2).images[0].size
    (8, 8)

Where to look::

    TokenRoute, token_routing           which blocks are skipped, and how one forward routes
    TREADTransformer2DModel             the denoiser; beside it TREADMamba2DModel, TREADRWKV2DModel
    apply_token_routing                 the same on an unmodified diffusers transformer
    FlowMatchingObjective, EDMObjective the loss, and the scheduler that samples its models
    TREADPipeline, GuidedPipeline       sampling, with SparseGuidance or another guider
    register_...                        adds a backbone, objective, loss term, guider, ... of your own

More names are in `diffusers_tread.data`, `metrics`, `hub`, `converters`, `flops` and `text`. Guides: docs/README.md.
"""

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
    # Imported on first use: diffusers' pipelines import its autoencoders, UNets and transformers, which training does
    # not need.
    if name in ("CfgLayout", "GuidedPipeline", "TREADPipeline", "register_pipeline_layout"):
        from . import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
