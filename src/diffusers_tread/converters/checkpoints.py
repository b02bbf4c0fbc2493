# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint files of TREAD's reference, DiT and SiT as `TREADPipeline`s."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin

from ..models import TREADTransformer2DModel
from ..models.transformer_tread_2d import PRESETS, sincos_positions
from ..objectives import EDMObjective, EpsilonObjective, FlowMatchingObjective, Objective
from ..pipelines import TREADPipeline
from .layouts import dit_names, drop_learned_variance, rename, reverse_time
from .read import read_dit_weights


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a checkpoint does not say: how its network was trained."""

    objective: Objective
    timestep_scale: float = 1.0
    routes: Literal["default"] | None = None
    reversed_time: bool = False


# DiT, section 4: ADM's linear schedule, 1e-4 to 2e-2 over 1000 steps, the objective's defaults. Flow schedulers give
# 1000 sigma, the flow models here were trained on [0, 1].
SOURCES = {
    "tread": _Source(objective=EDMObjective(), routes="default"),
    "tread_flow": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3, routes="default"),
    "dit": _Source(objective=EpsilonObjective()),
    "sit": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3, reversed_time=True),
}


def convert_checkpoint(
    checkpoint: str | Path,
    *,
    source: Literal["tread", "tread_flow", "dit", "sit"],
    vae: ModelMixin | None = None,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    weights: str | None = None,
    allow_unsafe_pickle: bool = False,
) -> TREADPipeline:
    """A pipeline from a checkpoint file with DiT's names; a learned variance is dropped.

    Args:
        checkpoint: `.safetensors` or `torch.save`.
        source: How the network was trained. "tread": the reference code of TREAD, with EDM's preconditioning
            (sigma_data 0.5). "tread_flow": the same with rectified flow, time in [0, 1] with noise at 1. "dit": DiT's
            noise prediction. "sit": SiT's velocity on the linear path, time in [0, 1] with noise at 0.
        vae: Decodes the latents; None for a pipeline without, which gives latents.
        num_attention_heads: Of the model; None for those of DiT's model of this width and depth.
        sample_size: Side of the training latents, square; None for what the checkpoint's `pos_embed` says.
        weights: Which weights of a training checkpoint, such as "ema" or "model"; None for the averaged ones if there
            are several.
        allow_unsafe_pickle: Whether to read a pickle that does more than hold tensors: it can run any code.

    Returns:
        The pipeline in float32, with the scheduler that the source needs. The routes of the two TREAD sources are the
        paper's, `default_route`; the others were trained without.

    Raises:
        ValueError: A file that cannot be read or could run code, weights missing or unknown, or sizes that neither the
            checkpoint nor the arguments tell.
    """
    if source not in SOURCES:
        raise ValueError(f"Expected a source among {sorted(SOURCES)}, got {source!r}.")
    origin = SOURCES[source]
    tensors = read_dit_weights(checkpoint, weights=weights, allow_unsafe_pickle=allow_unsafe_pickle)

    # Names, then sizes.
    positions = tensors.pop("pos_embed", None)
    state_dict = rename(tensors, dit_names(_num_layers(tensors)))
    config = _config(state_dict, positions, num_attention_heads=num_attention_heads, sample_size=sample_size)

    # What the source does otherwise.
    state_dict = drop_learned_variance(
        state_dict, in_channels=config["in_channels"], num_pixels=config["patch_size"] ** 2
    )
    if origin.reversed_time:
        state_dict = reverse_time(state_dict)

    config |= {"objective": origin.objective.name, "timestep_scale": origin.timestep_scale, "routes": origin.routes}
    return TREADPipeline(make_model(config, state_dict), origin.objective.scheduler(), vae=vae)


def _num_layers(tensors: dict[str, torch.Tensor]) -> int:
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in tensors]
    return 1 + max((int(match[1]) for match in blocks if match), default=0)


def _config(
    state_dict: dict[str, torch.Tensor],
    positions: torch.Tensor | None,
    *,
    num_attention_heads: int | None,
    sample_size: int | None,
) -> dict[str, Any]:
    """The sizes of the model that has weights of these shapes."""
    dim, in_channels, patch_size, _ = state_dict["patch_embedding.weight"].shape
    num_layers = sum(name.endswith(".modulation.weight") for name in state_dict)

    # Heads.
    if num_attention_heads is None:
        known = {(width, depth): heads for width, depth, heads in PRESETS.values()}
        num_attention_heads = known.get((dim, num_layers), 0)
    if num_attention_heads < 1 or dim % num_attention_heads:
        raise ValueError(
            f"Expected the number of attention heads, a divisor of the width {dim}, got {num_attention_heads}: no "
            f"shape tells it, and DiT has no model of this width and {num_layers} blocks. Give num_attention_heads "
            "(--num_attention_heads)."
        )

    # Positions.
    told = None if positions is None else patch_size * round(positions.shape[1] ** 0.5)
    sample_size = told if sample_size is None else sample_size
    if sample_size is None or told not in (None, sample_size):
        raise ValueError(
            f"Expected the side of the training latents, got {sample_size}, and {told} from the checkpoint's "
            "pos_embed. Give sample_size (--sample_size) if there is no pos_embed, and only then."
        )
    if positions is not None:
        base = sample_size // patch_size
        _check_positions(positions, sincos_positions(dim, base, base, base=base))

    return {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": dim // num_attention_heads,
        "num_layers": num_layers,
        "in_channels": in_channels,
        "sample_size": sample_size,
        "patch_size": patch_size,
        "num_classes": len(state_dict["class_embedding.weight"]) - 1,
        "mlp_ratio": len(state_dict["transformer_blocks.0.ff.net.0.proj.weight"]) / dim,
    }


def _check_positions(positions: torch.Tensor, expected: torch.Tensor) -> None:
    # Averaged over a training the frozen table drifts by rounding, as DiT's code remarks; a learned one is far off.
    if positions.shape[1:] != expected.shape or not torch.allclose(positions[0].float(), expected, atol=1e-2):
        raise ValueError(
            f"Expected pos_embed to be the sine-cosine table of {len(expected)} tokens, got another of shape "
            f"{list(positions.shape)}. Learned or scaled positions cannot be converted."
        )


def make_model(config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> TREADTransformer2DModel:
    """A model of a config with these weights, in evaluation mode; ValueError where a shape does not fit."""
    model = TREADTransformer2DModel(**config).eval()
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"Expected the shapes of a DiT, got others: {error}") from error
    return model
