# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Names and layouts of the same weights in DiT (arXiv 2212.09748), diffusers' DiT and our transformer.

The public implementations of TREAD (arXiv 2501.04765), SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423) use
DiT's names; LightningDiT has additional ones for its options. A table maps a source's name to ours. Here and in DiT,
query, key and value are stacked by rows in one matrix.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from ..finite import check_finite


Names = dict[str, str]
# Heads of REPA (arXiv 2410.06940) and its derivatives, which map hidden tokens to features of a vision encoder.
_TRAINING_HEADS = ("projectors", "projector", "proj_head", "projection_head", "repa_head", "alignment_head")

logger = logging.getLogger(__name__)


def dit_options(names: Iterable[str]) -> dict[str, str]:
    """The options of `TREADTransformer2DModel` that the names of a LightningDiT's weights imply; none for a DiT."""
    signs = {
        "blocks.0.norm1.weight": ("norm", "rms_norm"),
        "blocks.0.attn.q_norm.weight": ("qk_norm", "rms_norm"),
        "blocks.0.mlp.w12.weight": ("ffn", "swiglu"),
        "feat_rope.freqs_cos": ("positions", "sincos+rope"),
    }
    return dict(option for sign, option in signs.items() if sign in set(names))


def dit_names(num_layers: int, options: Mapping[str, str] = MappingProxyType({})) -> Names:
    """Maps DiT's and LightningDiT's names to ours, without the fixed tables of positions, which our model computes.

    Args:
        num_layers: Number of blocks.
        options: Options from `dit_options`.
    """
    # Linear layers.
    first, second = ("w12", "w3") if options.get("ffn") == "swiglu" else ("fc1", "fc2")
    modules = {
        "x_embedder.proj": "patch_embedding",
        "t_embedder.mlp.0": "timestep_embedding.linear_1",
        "t_embedder.mlp.2": "timestep_embedding.linear_2",
        "final_layer.adaLN_modulation.1": "modulation_out",
        "final_layer.linear": "proj_out",
    }
    for i in range(num_layers):
        ours = f"transformer_blocks.{i}"
        modules |= {
            f"blocks.{i}.attn.qkv": f"{ours}.attn.to_qkv",
            f"blocks.{i}.attn.proj": f"{ours}.attn.to_out.0",
            f"blocks.{i}.mlp.{first}": f"{ours}.ff.net.0.proj",
            f"blocks.{i}.mlp.{second}": f"{ours}.ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": f"{ours}.modulation",
        }

    # Scales of normalisations, which DiT does not have.
    scales = {"final_layer.norm_final": "norm_out"} if "norm" in options else {}
    for i in range(num_layers):
        for theirs, name, option in (
            ("norm1", "norm1", "norm"),
            ("norm2", "norm2", "norm"),
            ("attn.q_norm", "attn.norm_q", "qk_norm"),
            ("attn.k_norm", "attn.norm_k", "qk_norm"),
        ):
            scales |= {f"blocks.{i}.{theirs}": f"transformer_blocks.{i}.{name}"} if option in options else {}
    names = _parameters(modules) | _parameters(scales, ("weight",))
    return names | {"y_embedder.embedding_table.weight": "class_embedding.weight"}


def diffusers_dit_names(num_layers: int, *, attention_bias: bool) -> Names:
    """Maps the names of `DiTTransformer2DModel`, after `join_attention`, to ours; embedders are those of block 0."""
    embedders = "transformer_blocks.0.norm1.emb"
    modules = {
        "pos_embed.proj": "patch_embedding",
        f"{embedders}.timestep_embedder.linear_1": "timestep_embedding.linear_1",
        f"{embedders}.timestep_embedder.linear_2": "timestep_embedding.linear_2",
        "proj_out_1": "modulation_out",
        "proj_out_2": "proj_out",
    }
    attention = {}
    for i in range(num_layers):
        block = f"transformer_blocks.{i}"
        attention[f"{block}.attn1.to_qkv"] = f"{block}.attn.to_qkv"
        modules |= {
            f"{block}.attn1.to_out.0": f"{block}.attn.to_out.0",
            f"{block}.ff.net.0.proj": f"{block}.ff.net.0.proj",
            f"{block}.ff.net.2": f"{block}.ff.net.2",
            f"{block}.norm1.linear": f"{block}.modulation",
        }
    names = _parameters(modules) | _parameters(attention, ("weight", "bias") if attention_bias else ("weight",))
    return names | {f"{embedders}.class_embedder.embedding_table.weight": "class_embedding.weight"}


def rename(state_dict: Mapping[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """Renames the weights of a source to our names.

    Raises:
        ValueError: Weights are missing or unknown; the message names them.
    """
    check_names(state_dict, names)
    return {ours: state_dict[name] for name, ours in names.items()}


def rename_back(state_dict: Mapping[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """Renames our weights to the names of a source: the inverse of `rename`.

    Raises:
        ValueError: As for `rename`.
    """
    return rename(state_dict, {ours: name for name, ours in names.items()})


def join_attention(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks each `to_q`, `to_k` and `to_v` by rows into one `to_qkv`; an incomplete trio is left unchanged."""
    joined = dict(state_dict)
    for name in [name for name in state_dict if ".to_q." in name]:
        parts = [name.replace(".to_q.", f".{part}.") for part in ("to_q", "to_k", "to_v")]
        if all(part in state_dict for part in parts):
            joined[name.replace(".to_q.", ".to_qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def drop_training_heads(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the weights of heads that only training uses; a warning names them."""
    dropped = [name for name in tensors if name.split(".")[0] in _TRAINING_HEADS]
    if dropped:
        logger.warning(f"Left out {len(dropped)} weights of heads that only training uses: {_shorten(dropped)}.")
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for tensors that cannot be weights: not in floating point, NaN or infinity, or empty."""
    wrong = [
        f"{name} of {tensor.dtype}, {list(tensor.shape)}, {tensor.layout}"
        for name, tensor in tensors.items()
        if not tensor.dtype.is_floating_point
        or tensor.layout != torch.strided
        or tensor.numel() == 0
        or (tensor.ndim != 1 if re.search(r"\.bias$|\bnorm\w*\.weight$", name) else tensor.ndim < 2)
    ]
    if wrong:
        raise ValueError(
            f"Expected weights in floating point, got {_shorten(wrong)}. Turn quantised weights into floats before."
        )
    check_finite(tensors, what="weights")


def check_names(got: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError, naming missing and unknown weights, if there are any."""
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"Expected the weights of a DiT with adaLN-Zero, got others. Missing: {_shorten(missing)}, unknown: "
            f"{_shorten(unknown)}. Is it a variant of the architecture?"
        )


def drop_learned_variance(
    state_dict: Mapping[str, torch.Tensor], *, in_channels: int, num_pixels: int
) -> dict[str, torch.Tensor]:
    """Keeps only the first C channels of the output: of the 2C that DiT learns, the others are variances.

    Args:
        state_dict: Weights under our names. The rows of `proj_out` are the P*P pixels of a patch times the channels.
        in_channels: Number of channels C.
        num_pixels: Pixels P*P of a patch.

    Raises:
        ValueError: The output has neither C nor 2C channels.
    """
    kept = {}
    for name in ("proj_out.weight", "proj_out.bias"):
        rows, rest = state_dict[name].shape[0], state_dict[name].shape[1:]
        if rows not in (num_pixels * in_channels, 2 * num_pixels * in_channels):
            raise ValueError(
                f"Expected an output of {in_channels} or {2 * in_channels} channels for each of a patch's "
                f"{num_pixels} pixels, got {rows} rows."
            )
        kept[name] = state_dict[name].reshape(num_pixels, -1, *rest)[:, :in_channels].flatten(0, 1)
    return {**state_dict, **kept}


def reverse_time(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts a SiT (noise at t = 0, velocity data - noise) to our flow (noise at sigma = 1, velocity noise - data).

    With t = 1 - sigma, the embedding's cos(w t) and sin(w t) are a reflection of cos(w sigma) and sin(w sigma), which
    is absorbed into the first linear layer. The change of sign is absorbed into the last layer.
    """
    weight = state_dict["timestep_embedding.linear_1.weight"]  # D 256, first for the cosines, then for the sines
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)  # w, the angle at t = 1
    cos, sin = frequencies.cos(), frequencies.sin()
    reflected = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    return {
        **state_dict,
        "timestep_embedding.linear_1.weight": reflected.to(weight.dtype),
        "proj_out.weight": -state_dict["proj_out.weight"],
        "proj_out.bias": -state_dict["proj_out.bias"],
    }


def swap_gates(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Swaps SwiGLU's first two matrices to diffusers' order.

    LightningDiT stacks gate and value by rows in `w12`, followed by `w3`: the output is w3 (silu(w1 x) * w2 x).
    diffusers stacks value and gate.
    """
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if ".ff.net.0.proj." in name else tensor
        for name, tensor in state_dict.items()
    }


def _parameters(modules: Names, kinds: tuple[str, ...] = ("weight", "bias")) -> Names:
    return {f"{name}.{kind}": f"{ours}.{kind}" for name, ours in modules.items() for kind in kinds}


def _shorten(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"
