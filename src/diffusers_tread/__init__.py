# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .guiders import SparseGuidance
from .models import TREADTransformer2DModel
from .pipelines import TREADPipeline
from .routing import TokenRoute, TokenRouter, default_route, get_token_router, token_routing
from .schedulers import EDMHeunScheduler
from .training import EDMObjective, FlowMatchingObjective
from .version import __version__


__all__ = [
    "EDMHeunScheduler",
    "EDMObjective",
    "FlowMatchingObjective",
    "SparseGuidance",
    "TREADPipeline",
    "TREADTransformer2DModel",
    "TokenRoute",
    "TokenRouter",
    "default_route",
    "get_token_router",
    "token_routing",
    "__version__",
]
