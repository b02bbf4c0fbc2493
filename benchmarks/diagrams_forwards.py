# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What diagrams.py shows: one routed forward and one step of sampling with Sparse Guidance, as the models ran them.

Shapes: H and W an image's sides, N tokens, K kept tokens.
"""

from dataclasses import dataclass

import torch

from diffusers_tread import RoutingCall, SparseGuidance, TokenRoute, TREADPipeline, TREADTransformer2DModel


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedForward:
    """What one routed forward did with one image of N tokens."""

    noisy: torch.Tensor
    """[3, H, W], the network's input."""
    clean: torch.Tensor
    """[3, H, W], the image that it predicts."""
    kept: torch.Tensor
    """[K] ids of the kept tokens."""
    changes: torch.Tensor
    """[N, blocks], the norm of what a block added to a token; NaN where the token skipped the block."""
    route: TokenRoute


@dataclass(frozen=True, kw_only=True, eq=False)
class GuidedStep:
    """What one step of sampling with Sparse Guidance did with one image; index 0 is the strong branch, 1 the weak."""

    noisy: torch.Tensor
    """[3, H, W], the input of both branches."""
    kept: list[torch.Tensor]
    """[K] ids of a branch's kept tokens."""
    clean: list[torch.Tensor]
    """[3, H, W], the image that a branch predicts."""
    guided: torch.Tensor
    """[3, H, W], the image that the guided prediction stands for."""
    num_tokens: int
    """N."""
    guidance_scale: float
    step: int
    """Which one of `num_steps`, 0-based."""
    num_steps: int
    route: TokenRoute
    shares_prefix: bool
    """Whether the weak branch took over the tokens in front of the route."""


@torch.no_grad()
def routed_forward(
    model: TREADTransformer2DModel, image: torch.Tensor, label: int, *, time: float, seed: int
) -> RoutedForward:
    """One forward of an image, [3, H, W] in [-1, 1], with so much noise; the seed is the noise's and the subset's."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    noisy = (1 - time) * image + time * noise

    # The norms, of as many tokens as the block was given.
    norms = []
    hooks = [
        block.register_forward_hook(lambda _, args, after: norms.append((after - args[0])[0].norm(dim=-1)))
        for block in model.transformer_blocks
    ]
    try:
        output = model(
            noisy[None],
            torch.tensor([1000 * time]),
            class_labels=torch.tensor([label]),
            routing=RoutingCall(enabled=True, seed=seed),
        )
    finally:
        for hook in hooks:
            hook.remove()

    # Put where the tokens belong.
    kept, everyone = output.kept_token_ids[0][0], torch.arange(len(norms[0]))
    changes = torch.full((len(everyone), len(norms)), torch.nan)
    for block, norm in enumerate(norms):
        changes[kept if len(norm) == len(kept) else everyone, block] = norm
    return RoutedForward(
        noisy=noisy,
        clean=noisy - time * output.sample[0],
        kept=kept,
        changes=changes,
        route=model.token_router.routes[0],
    )


def guided_step(
    pipeline: TREADPipeline, label: int, *, guidance_scale: float, step: int, num_steps: int, seed: int
) -> GuidedStep:
    """Samples one image with Sparse Guidance, ratios 0.2 and 0.8, and tells of one step what the pipeline ran."""
    guider = SparseGuidance(guidance_scale=guidance_scale, strong_ratio=0.2, weak_ratio=0.8)
    sampler, calls = TREADPipeline(pipeline.transformer, pipeline.scheduler, guider=guider), []
    sampler.set_progress_bar_config(disable=True)
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    try:
        sampler([label], num_inference_steps=num_steps, generator=torch.Generator().manual_seed(seed))
    finally:
        hook.remove()

    strong, weak = calls[2 * step : 2 * step + 2]
    (latents, timestep), predictions = strong[0], [call[2][0] for call in (strong, weak)]
    guided = guider.forward(*predictions).pred
    strong_image, weak_image, guided_image = [
        (latents - timestep / 1000 * velocity)[0] for velocity in [*predictions, guided]
    ]
    return GuidedStep(
        noisy=latents[0],
        kept=[call[2][1][0][0] for call in (strong, weak)],
        clean=[strong_image, weak_image],
        guided=guided_image,
        num_tokens=(latents.shape[-1] // pipeline.transformer.config.patch_size) ** 2,
        guidance_scale=guidance_scale,
        step=step,
        num_steps=num_steps,
        route=pipeline.transformer.token_router.routes[0],
        shares_prefix=weak[1].get("prefix") is not None,
    )
