# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .guiders import RatioSchedule, SparseGuidance
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
from .models import TREADTransformer2DModel
from .pipelines import TREADPipeline
from .routing import TokenRoute, TokenRouter, default_route, get_token_router, token_routing
from .schedulers import EDMHeunScheduler
from .training import EDMObjective, FlowMatchingObjective
from .version import __version__


__all__ = [
    "BlockSpec",
    "EDMHeunScheduler",
    "EDMObjective",
    "FlowMatchingObjective",
    "ModelSpec",
    "RatioSchedule",
    "SparseGuidance",
    "TREADPipeline",
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
    "register_model_spec",
    "remove_token_routing",
    "token_routing",
    "__version__",
]
