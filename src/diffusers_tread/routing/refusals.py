# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checks for model setups that routing does not support."""

import torch


def check_can_route(denoiser: torch.nn.Module) -> None:
    """Raises ValueError if `denoiser` has context parallelism or a cache, which address tokens by position."""
    parallel = getattr(denoiser, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError(
            "Expected a model without context parallelism in a routed forward: it splits the sequence by position. "
            "Disable it, or switch routing off: token_routing(model, enabled=False)."
        )
    if has_cache(denoiser):
        raise ValueError(
            "Expected a model without a cache in a routed forward: what it keeps from one step belongs to other "
            "tokens than the next one runs. Use model.disable_cache() or take off the cache's hooks, or switch "
            "routing off: token_routing(model, enabled=False)."
        )


def check_can_fuse(denoiser: torch.nn.Module) -> None:
    """Raises ValueError if `denoiser`, which has a route with a fusion, also has a cache."""
    if has_cache(denoiser):
        raise ValueError(
            "Expected a model without a cache where a route has rejoin='fuse': caches add up what blocks change, and "
            "the fusion between them is none. Use model.disable_cache() or take off the cache's hooks."
        )


def check_can_drop_path(denoiser: torch.nn.Module) -> None:
    """Raises ValueError if `denoiser` has group offloading, which fetches blocks in the order of its first forward."""
    # `_takes_prefix` in `pipelines.guided_prediction` has the same limit: it skips the blocks before a route.
    if "group_offloading" in hook_names(denoiser):
        raise ValueError(
            "Expected a model without group offloading where a path is dropped: it fetches blocks in the order of its "
            "first forward, whichever are left out. Use another offloading, or another guider."
        )


def has_cache(model: torch.nn.Module) -> bool:
    """Whether the model has a diffusers cache, set by `enable_cache` or by a function such as
    `apply_first_block_cache`. While compiling, only the former is checked."""
    if getattr(model, "is_cache_enabled", False) or torch.compiler.is_compiling():
        return getattr(model, "is_cache_enabled", False)
    return any(word in name for name in hook_names(model) for word in ("cache", "fbc", "broadcast"))


def hook_names(model: torch.nn.Module) -> set[str]:
    """The names of diffusers' hooks on the modules of a model."""
    names, modules = set(), [model]
    # Runs in every routed forward, and `model.modules()` takes four times as long (0.3 ms for XL/2).
    for module in modules:
        if module is None:
            continue
        if "_diffusers_hook" in module.__dict__:
            names |= module._diffusers_hook.hooks.keys()
        if module._modules:
            modules.extend(module._modules.values())
    return names
