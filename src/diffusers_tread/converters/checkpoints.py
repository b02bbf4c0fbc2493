# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoint files of TREAD's reference code, DiT, SiT and LightningDiT into `TREADPipeline`s."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin

from ..models import TREADTransformer2DModel
from ..models.latent_denoiser import sincos_positions
from ..models.transformer_tread_2d import PRESETS, feed_forward_width, rotary_positions
from ..objectives import EDMObjective, EpsilonObjective, FlowMatchingObjective, Objective
from ..pipelines import TREADPipeline
from .layouts import (
    check_tensors,
    dit_names,
    dit_options,
    drop_learned_variance,
    drop_training_heads,
    rename,
    reverse_time,
    swap_gates,
)
from .read import DiTWeights, read_dit_weights


@dataclass(frozen=True, kw_only=True)
class _Source:
    """How a network was trained, which its checkpoint does not say."""

    objective: Objective
    timestep_scale: float = 1.0
    routes: Literal["default"] | None = None
    reversed_time: bool = False


# DiT, section 4: ADM's linear schedule, 1e-4 to 2e-2 over 1000 steps, which are the objective's defaults. Flow
# schedulers give timesteps 1000 sigma, but the flow models here were trained with time in [0, 1].
SOURCES = {
    "tread": _Source(objective=EDMObjective(), routes="default"),
    "tread_flow": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3, routes="default"),
    "dit": _Source(objective=EpsilonObjective()),
    "sit": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3, reversed_time=True),
    "repa": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3),
    "lightningdit": _Source(objective=FlowMatchingObjective(), timestep_scale=1e-3, reversed_time=True),
}
# Tables in a checkpoint that our model computes: DiT's positions, and cosines and sines of LightningDiT's.
_TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
# Classes of CIFAR-10, CIFAR-100 and ImageNet: a table with one more row has a null class.
_CLASSES_OF_KNOWN_DATA = (10, 100, 1000)


def convert_checkpoint(
    checkpoint: str | Path,
    *,
    source: Literal["tread", "tread_flow", "dit", "sit", "repa", "lightningdit"],
    vae: ModelMixin | None = None,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    allow_unsafe_pickle: bool = False,
) -> TREADPipeline:
    """Makes a pipeline from a checkpoint file with DiT's names; a learned variance and training heads are dropped.

    Args:
        checkpoint: A `.safetensors` file, or one written by `torch.save`.
        source: How the network was trained. "tread": the reference code of TREAD, with EDM's preconditioning
            (sigma_data 0.5). "tread_flow": the same with rectified flow, time in [0, 1] with noise at 1. "dit": DiT's
            noise prediction. "sit": SiT's velocity on the linear path, time in [0, 1] with noise at 0. "repa": REPA's
            SiT and its derivatives, with time and velocity reversed: noise at 1. "lightningdit": LightningDiT's
            velocity, like SiT's. RMSNorm, SwiGLU, normalised queries and keys and rotary positions are recognised by
            the names of their weights, for any source.
        vae: VAE that decodes the latents; None for a pipeline without VAE, which returns latents.
        num_attention_heads: Attention heads of the model; None takes them from rotary positions, or from DiT's model
            of this width and depth.
        sample_size: Side of the square training latents; None takes it from the checkpoint's `pos_embed`.
        num_classes: Number of classes without the null class, which is the last row of the label table. None takes it
            from the checkpoint's own settings or, without these, from the table if it has one row more than CIFAR or
            ImageNet has classes. Other tables do not tell whether they have a null class.
        weights: Which weights of a training checkpoint, such as "ema" or "model"; None for the averaged ones if there
            are several.
        allow_unsafe_pickle: Whether to read a pickle that does more than hold tensors. It can run any code.

    Returns:
        The pipeline in float32, with the scheduler that the source needs. The two TREAD sources get the paper's route,
        `default_route`; the others were trained without routes.

    Raises:
        ValueError: The file cannot be read or could run code; weights are missing, unknown, not finite or not in
            floating point; neither the checkpoint nor the arguments tell sizes or classes; the table has no null
            class; a checkpoint of REPA is given as "sit", or its settings contradict the source in another way.
    """
    # Read.
    if source not in SOURCES:
        raise ValueError(f"Expected a source among {sorted(SOURCES)}, got {source!r}.")
    origin = SOURCES[source]
    read = read_dit_weights(checkpoint, weights=weights, allow_unsafe_pickle=allow_unsafe_pickle)
    _check_source(source, read)

    # Rename the weights and find the config.
    tensors = drop_training_heads(read.tensors)
    options = dit_options(tensors)
    tables = {name: tensors.pop(name) for name in _TABLES if name in tensors}
    state_dict = rename(tensors, dit_names(_num_layers(tensors), options))
    check_tensors(state_dict | tables)
    config = _config(state_dict, tables, options, num_attention_heads=num_attention_heads, sample_size=sample_size)
    config["num_classes"] = _num_classes(
        len(state_dict["class_embedding.weight"]), num_classes, read.settings.get("num_classes")
    )

    # Convert what the source computes differently.
    if config.get("ffn") == "swiglu":
        state_dict = swap_gates(state_dict)
    state_dict = drop_learned_variance(
        state_dict, in_channels=config["in_channels"], num_pixels=config["patch_size"] ** 2
    )
    if origin.reversed_time:
        state_dict = reverse_time(state_dict)

    # The pipeline.
    config |= {"objective": origin.objective.name, "timestep_scale": origin.timestep_scale, "routes": origin.routes}
    return TREADPipeline(make_model(config, state_dict), origin.objective.scheduler(), vae=vae)


def _check_source(source: str, read: DiTWeights) -> None:
    """Raises ValueError if heads or saved settings show that the network was trained in another way."""
    of_repa = any(name.startswith("projectors.") for name in read.tensors) or "proj_coeff" in read.settings
    if source == "sit" and of_repa:
        raise ValueError(
            "Expected a checkpoint of SiT, got one of REPA, whose time and velocity run the other way. Use the source "
            "'repa'."
        )
    path, prediction = (str(read.settings.get(name, "")).lower() for name in ("path_type", "prediction"))
    if source in ("sit", "repa", "lightningdit") and (
        path not in ("", "linear") or prediction not in ("", "v", "velocity")
    ):
        raise ValueError(
            f"Expected a velocity on the linear path, got a checkpoint of prediction {prediction!r} on the path "
            f"{path!r}. These are not supported."
        )


def _num_layers(tensors: dict[str, torch.Tensor]) -> int:
    highest = max((int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))), default=0)
    if highest >= len(tensors):  # the names of a million blocks would fill the memory
        raise ValueError(f"Expected blocks numbered from 0, got block {highest} among {len(tensors)} weights.")
    return 1 + highest


def _num_classes(rows: int, given: int | None, saved: Any) -> int:
    """Finds the number of classes, without the null class, of a label table."""
    if given is None and isinstance(saved, int):
        given = saved
    if given is None and rows - 1 in _CLASSES_OF_KNOWN_DATA:
        given = rows - 1
    if given is None:
        raise ValueError(
            f"Expected num_classes (--num_classes) for a label table of {rows} rows, got none: it may be {rows - 1} "
            f"classes and the null class, or {rows} classes trained without label dropout. Give the number of "
            "classes, 0 for a model without."
        )
    if rows != given + 1:
        raise ValueError(
            f"Expected a label table of {given + 1} rows, {given} classes and the null class, got {rows} rows. "
            + (
                "Trained without label dropout, it has no null class, which guidance needs; a single row is a model "
                "without classes: num_classes=0 (--num_classes 0)."
                if rows == given
                else "Give the number of classes (num_classes, --num_classes)."
            )
        )
    return given


def _config(
    state_dict: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    options: dict[str, str],
    *,
    num_attention_heads: int | None,
    sample_size: int | None,
) -> dict[str, Any]:
    """Finds the config of a model from the shapes of its weights."""
    # Width, depth and patches.
    shape = state_dict["patch_embedding.weight"].shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"Expected a patch embedding of shape [D, C, P, P], got {list(shape)}.")
    dim, in_channels, patch_size, _ = shape
    num_layers = sum(name.endswith(".modulation.weight") for name in state_dict)

    # Heads.
    if num_attention_heads is None and "feat_rope.freqs_cos" in tables:
        num_attention_heads = dim // tables["feat_rope.freqs_cos"].shape[-1]
    elif num_attention_heads is None:
        known = {(width, depth): heads for width, depth, heads in PRESETS.values()}
        num_attention_heads = known.get((dim, num_layers), 0)
    if num_attention_heads < 1 or dim % num_attention_heads:
        raise ValueError(
            f"Expected the number of attention heads, a divisor of the width {dim}, got {num_attention_heads}: no "
            f"shape tells it, and DiT has no model of this width and {num_layers} blocks. Give num_attention_heads "
            "(--num_attention_heads)."
        )

    # Positions.
    positions = tables.get("pos_embed")
    if positions is not None and positions.ndim != 3:
        raise ValueError(f"Expected pos_embed of shape [1, N, D], got {list(positions.shape)}.")
    told = None if positions is None else patch_size * round(positions.shape[1] ** 0.5)
    sample_size = told if sample_size is None else sample_size
    if sample_size is None or told not in (None, sample_size):
        raise ValueError(
            f"Expected the side of the training latents, got {sample_size}, and {told} from the checkpoint's "
            "pos_embed. Give sample_size (--sample_size) if there is no pos_embed, and only then."
        )
    base = sample_size // patch_size
    if positions is not None:
        _check_table("pos_embed", positions[0], sincos_positions(dim, base, base, base=base))
    if "feat_rope.freqs_cos" in tables:
        _check_rotary(tables, dim // num_attention_heads, base)

    return {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": dim // num_attention_heads,
        "num_layers": num_layers,
        "in_channels": in_channels,
        "sample_size": sample_size,
        "patch_size": patch_size,
        "mlp_ratio": _mlp_ratio(state_dict["transformer_blocks.0.ff.net.2.weight"].shape[1], dim, options),
        **options,
    }


def _mlp_ratio(hidden: int, dim: int, options: dict[str, str]) -> float:
    """The ratio for which a feed-forward layer has `hidden` channels; DiT's 4 if it fits."""
    ffn = options.get("ffn", "gelu-approximate")
    if feed_forward_width(dim, 4.0, ffn) == hidden:
        return 4.0
    return (-(-3 * hidden // 2) if ffn == "swiglu" else hidden) / dim


def _check_rotary(tables: dict[str, torch.Tensor], head_dim: int, base: int) -> None:
    """Checks rotary tables, in which LightningDiT writes each angle for both channels of a pair."""
    if head_dim % 4:
        raise ValueError(f"Expected heads of a width divisible by 4 for rotary positions, got {head_dim}.")
    expected = rotary_positions(head_dim, base, base, base=base)[0].repeat_interleave(2, dim=1).chunk(2, dim=1)
    for name, table in zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), expected, strict=True):
        _check_table(name, tables[name], table)


def _check_table(name: str, table: torch.Tensor, expected: torch.Tensor) -> None:
    # An EMA of the frozen table drifts by rounding, as DiT's code remarks; a learned table is far off.
    if table.shape != expected.shape or not torch.allclose(table.float(), expected, atol=1e-2):
        raise ValueError(
            f"Expected {name} to be the sine-cosine table of {len(expected)} tokens, got another of shape "
            f"{list(table.shape)}. Learned or scaled positions cannot be converted."
        )


def make_model(config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> TREADTransformer2DModel:
    """Makes a model with these weights, in evaluation mode. Raises ValueError if a shape does not fit."""
    model = TREADTransformer2DModel(**config).eval()
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"Expected the shapes of a DiT, got others: {error}") from error
    return model
