# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How many FLOPs a `TREADTransformer2DModel` needs with and without its routes, in a forward and in guided sampling.

A multiply-add counts as two FLOPs, as in torch's `FlopCounterMode`. The papers write "GFLOPs" for multiply-adds: half
of the numbers here. Norms, activations, softmax and residuals are not counted.
Shapes: N tokens, K kept tokens, D width, P patch size, C channels.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import BaseGuidance

from .models import TREADTransformer2DModel
from .routing import num_kept_tokens, resolve_routes
from .routing.route import check_selection_ratio


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one forward of one sample."""

    linear: int
    """Linear layers and the patch convolution; half of it is the "GFLOPs" of Sparse Guidance's paper (see above)."""

    attention: int
    """The products query x key and weights x value, quadratic in the tokens."""

    @property
    def total(self) -> int:
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True)
class GuidanceFlops:
    """FLOPs of one sample's guided sampling, next to dense classifier-free guidance: two dense forwards per step."""

    steps: tuple[ForwardFlops, ...]
    """Of each step, all its forwards together."""

    dense: ForwardFlops
    """Of one dense forward of the main model."""

    @property
    def linear(self) -> int:
        """Of the linear layers, all steps together."""
        return sum(step.linear for step in self.steps)

    @property
    def total(self) -> int:
        """Of linear layers and attention, all steps together."""
        return sum(step.total for step in self.steps)

    @property
    def share_of_cfg(self) -> float:
        """`total` over that of as many steps of dense classifier-free guidance."""
        return self.total / (len(self.steps) * 2 * self.dense.total)


def forward_flops(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]",
    num_tokens: int | None = None,
    *,
    selection_ratio: float | None = None,
) -> ForwardFlops:
    """FLOPs of one routed forward of one sample. For its backward see `training_flops`.

    Args:
        model_or_config: The model, or its config.
        num_tokens: N, the tokens of an image; None for the size of training.
        selection_ratio: Share of tokens routed away, in [0, 1), on every route; 0.0 is dense. None: each route's own.

    Raises:
        ValueError: `selection_ratio` out of range, or fewer than one token.

    Example:
        >>> from diffusers_tread import TREADTransformer2DModel
        >>> from diffusers_tread.flops import forward_flops
        >>> model = TREADTransformer2DModel.from_preset("S/2", num_classes=10)
        >>> round(forward_flops(model, selection_ratio=0.0).total / forward_flops(model).total, 2)
        1.44
    """
    config, num_tokens = _read_config(model_or_config, num_tokens)
    width, channels, patch_area = _width(config), config["in_channels"], config["patch_size"] ** 2
    out_channels = channels if config["out_channels"] is None else config["out_channels"]

    # Outside the blocks: patches in and out, the timestep's two layers, the last modulation.
    outside = 2 * num_tokens * patch_area * (channels + out_channels) * width
    outside += 2 * (256 + width) * width + 2 * width * 2 * width

    blocks = [_block_flops(config, tokens) for tokens in _tokens_per_block(config, num_tokens, selection_ratio)]
    return ForwardFlops(
        linear=outside + sum(block.linear for block in blocks), attention=sum(block.attention for block in blocks)
    )


def training_flops(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]",
    num_tokens: int | None = None,
    *,
    selection_ratio: float | None = None,
) -> int:
    """FLOPs of one routed forward and backward of one sample, as torch counts them with decomposed attention.

    Three times the forward's: each product has two in the backward, one per factor. Only the patch convolution and the
    timestep's first layer have one, because latents and times need no gradient; that is less than 0.1 % of a preset.
    Not counted: what gradient checkpointing or a fused attention computes again, the optimiser, averages, losses.
    Arguments and errors as `forward_flops`.
    """
    config, num_tokens = _read_config(model_or_config, num_tokens)
    first_layers = 2 * (num_tokens * config["patch_size"] ** 2 * config["in_channels"] + 256) * _width(config)
    return 3 * forward_flops(config, num_tokens, selection_ratio=selection_ratio).total - first_layers


def flop_ceiling(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]",
    num_tokens: int | None = None,
    *,
    selection_ratio: float | None = None,
) -> float:
    """Dense over routed FLOPs, attention counted: the speed-up of a step that spends its time on nothing else.

    With the default route and 256 tokens 1.44 for S/2, 1.43 for B/2, 1.67 for L/2, 1.72 for XL/2 (4,096 tokens: 1.95).
    Arguments and errors as `forward_flops`.
    """
    dense = forward_flops(model_or_config, num_tokens, selection_ratio=0.0)
    routed = forward_flops(model_or_config, num_tokens, selection_ratio=selection_ratio)
    return dense.total / routed.total


def block_flops_saved(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]",
    num_tokens: int | None = None,
    *,
    selection_ratio: float | None = None,
) -> float:
    """The share of the blocks' FLOPs, attention counted, that the routes save, in [0, 1).

    Arguments and errors as `forward_flops`.
    """
    config, num_tokens = _read_config(model_or_config, num_tokens)
    tokens_per_block = _tokens_per_block(config, num_tokens, selection_ratio)
    routed = sum(_block_flops(config, tokens).total for tokens in tokens_per_block)
    return 1.0 - routed / (config["num_layers"] * _block_flops(config, num_tokens).total)


def guidance_flops(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]",
    guider: BaseGuidance,
    num_tokens: int | None = None,
    *,
    num_steps: int = 40,
    guidance_model_or_config: "TREADTransformer2DModel | Mapping[str, Any] | None" = None,
    shared_prefix: bool = True,
) -> GuidanceFlops:
    """FLOPs of sampling one image with a guider, schedules and intervals included.

    Args:
        model_or_config: The model, or its config.
        guider: `SparseGuidance`, whose ratios count, or any other guider, whose forwards are all counted as dense
            ones of the model. It stays as it is.
        num_tokens: N, the tokens of an image; None for the size of training.
        num_steps: Guided predictions: the sampler's steps N, or 2N - 1 with Heun's method.
        guidance_model_or_config: What runs the weak branch of `SparseGuidance(weak_checkpoint=True)`; None for a
            model of the same size.
        shared_prefix: Whether the blocks in front of the first route count once where both branches of
            `SparseGuidance` have the same inputs, as `TREADPipeline` runs them. False counts all of both branches, as
            the papers do and as a loop of your own runs them.

    Raises:
        ValueError: Fewer than one step, or as `forward_flops`.

    Example:
        >>> from diffusers_tread import SparseGuidance, TREADTransformer2DModel
        >>> from diffusers_tread.flops import guidance_flops
        >>> model = TREADTransformer2DModel.from_preset("S/2", num_classes=10)
        >>> round(guidance_flops(model, SparseGuidance(strong_ratio=0.2, weak_ratio=0.8)).share_of_cfg, 2)
        0.62
    """
    if num_steps < 1:
        raise ValueError(f"Expected num_steps >= 1, the guided predictions of one sampling, got {num_steps}.")
    config, num_tokens = _read_config(model_or_config, num_tokens)
    dense = forward_flops(model_or_config, num_tokens, selection_ratio=0.0)
    is_sparse = hasattr(guider, "check_denoisers")  # not by its class: a guider from the Hub brings code of its own
    models = [model_or_config, model_or_config]
    if is_sparse and guider.weak_checkpoint and guidance_model_or_config is not None:
        models[1] = guidance_model_or_config
    shared = _prefix_flops(config, num_tokens) if shared_prefix and getattr(guider, "shares_inputs", False) else None

    guider, steps = copy.deepcopy(guider), []
    for step in range(num_steps):
        guider.set_state(step=step, num_inference_steps=num_steps, timestep=None)
        forwards = [dense] * guider.num_conditions
        if is_sparse:
            branches = zip(models, guider.branch_ratios, strict=False)
            forwards = [forward_flops(model, num_tokens, selection_ratio=ratio) for model, ratio in branches]
        linear, attention = sum(one.linear for one in forwards), sum(one.attention for one in forwards)
        if shared is not None and len(forwards) == 2:
            linear, attention = linear - shared.linear, attention - shared.attention
        steps.append(ForwardFlops(linear=linear, attention=attention))
    return GuidanceFlops(steps=tuple(steps), dense=dense)


def _block_flops(config: Mapping[str, Any], num_tokens: int) -> ForwardFlops:
    """One block: per token query, key, value, output and feed-forward; per sample the modulation."""
    width = _width(config)
    per_token = 2 * (4 * width + 2 * int(config["mlp_ratio"] * width)) * width
    modulation = 2 * 6 * width * width
    return ForwardFlops(linear=num_tokens * per_token + modulation, attention=2 * 2 * num_tokens**2 * width)


def _prefix_flops(config: Mapping[str, Any], num_tokens: int) -> ForwardFlops:
    """The blocks in front of the first route, which see all tokens."""
    routes, block = resolve_routes(config["routes"], config["num_layers"]), _block_flops(config, num_tokens)
    num_blocks = routes[0].start if routes else 0
    return ForwardFlops(linear=num_blocks * block.linear, attention=num_blocks * block.attention)


def _tokens_per_block(config: Mapping[str, Any], num_tokens: int, selection_ratio: float | None) -> list[int]:
    """How many tokens each block sees: K inside a route, N outside."""
    if selection_ratio is not None:
        check_selection_ratio(selection_ratio)
    tokens = [num_tokens] * config["num_layers"]
    for route in resolve_routes(config["routes"], config["num_layers"]):
        ratio = route.selection_ratio if selection_ratio is None else selection_ratio
        for index in range(route.start, route.end + 1):
            tokens[index] = num_kept_tokens(num_tokens, ratio)
    return tokens


def _read_config(
    model_or_config: "TREADTransformer2DModel | Mapping[str, Any]", num_tokens: int | None
) -> tuple[Mapping[str, Any], int]:
    config = model_or_config if isinstance(model_or_config, Mapping) else model_or_config.config
    if num_tokens is None:
        num_tokens = (config["sample_size"] // config["patch_size"]) ** 2
    if num_tokens < 1:
        raise ValueError(f"Expected num_tokens >= 1, the tokens of one image, got {num_tokens}.")
    return config, num_tokens


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]
