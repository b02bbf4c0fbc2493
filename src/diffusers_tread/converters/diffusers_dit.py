# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts folders of diffusers' own DiT into `TREADPipeline`s."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, ModelMixin, SchedulerMixin

from ..hub import check_model_index
from ..models import TREADTransformer2DModel
from ..objectives import EpsilonObjective
from ..pipelines import TREADPipeline
from .checkpoints import make_model
from .layouts import check_names, check_tensors, diffusers_dit_names, drop_learned_variance, join_attention, rename


logger = logging.getLogger(__name__)


def convert_diffusers_dit(folder: str | Path, *, vae: ModelMixin | None = None) -> TREADPipeline:
    """Makes a pipeline from a local folder of diffusers' `DiTPipeline` or `DiTTransformer2DModel`.

    The model computes the same as diffusers' class, which differs from DiT: its timestep frequencies are
    10000^(-i / 127), not 10000^(-i / 128), and the epsilon before the feed-forward layer is 1e-5 by default.

    Args:
        folder: Folder of a pipeline, with `model_index.json`, whose scheduler, class names and VAE are kept; or folder
            of a transformer.
        vae: VAE to use instead of the folder's.

    Returns:
        The pipeline in float32; a learned variance is dropped. Without a scheduler in the folder it gets DiT's.

    Raises:
        ValueError: The folder does not exist or has code; weights are missing, unknown, not finite or not in floating
            point; sizes are absurd; the activation is not DiT's; or blocks have different embedders, which diffusers'
            class supports and ours does not.
    """
    # Check the folder.
    index = Path(folder) / "model_index.json"
    is_pipeline = index.is_file()
    if not is_pipeline and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"Expected a local folder of a DiTPipeline or its transformer, got {folder}. Download it.")
    if is_pipeline:
        content = json.loads(index.read_text(encoding="utf-8"))
        check_model_index(content, folder, required=("transformer", "scheduler", "vae"))
    _check_sizes(index.parent / "transformer" if is_pipeline else index.parent)

    # Convert the transformer.
    loaded: Any = DiTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer" if is_pipeline else None, output_loading_info=True
    )
    original, loading = loaded
    tensors = dict(original.state_dict())
    check_names((set(tensors) - set(loading["missing_keys"])) | set(loading["unexpected_keys"]), tensors)
    transformer = _convert_diffusers_transformer(original, tensors)

    # The pipeline.
    if not is_pipeline:
        return TREADPipeline(transformer, EpsilonObjective().scheduler(), vae=vae)
    pipe = DiTPipeline.from_pretrained(folder, transformer=original)
    scheduler = _without_learned_variance(pipe.scheduler)
    vae = pipe.vae if vae is None else vae
    return TREADPipeline(transformer, scheduler, vae=vae, id2label=content.get("id2label"))


def _check_sizes(folder: Path) -> None:
    """Raises ValueError for absurd sizes, because diffusers makes a model of these sizes before it reads weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    most = {"num_layers": 1000, "sample_size": 4096, "patch_size": 4096, "in_channels": 4096, "out_channels": 8192}
    most |= {"num_attention_heads": 1024, "attention_head_dim": 4096, "num_embeds_ada_norm": 10**7}
    for name, highest in most.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= highest):
            raise ValueError(f"Expected {name} from 1 to {highest} in {folder / 'config.json'}, got {value!r}.")


def _without_learned_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Returns the scheduler without a setting for learned variances, because these are dropped from the weights."""
    config = dict(scheduler.config)
    if config.get("variance_type") in ("learned", "learned_range"):
        logger.warning(f"Set back variance_type={config.pop('variance_type')!r}: learned variances are dropped.")
    return type(scheduler).from_config(config)


def _convert_diffusers_transformer(
    original: DiTTransformer2DModel, tensors: dict[str, torch.Tensor]
) -> TREADTransformer2DModel:
    config = original.config
    if config.activation_fn != "gelu-approximate":
        raise ValueError(f"Expected the activation 'gelu-approximate', got {config.activation_fn!r}.")

    # Keep the embedder of block 0, which all blocks must share.
    first = "transformer_blocks.0.norm1.emb."
    for name in [name for name in tensors if ".norm1.emb." in name and not name.startswith(first)]:
        if not torch.equal(tensors.pop(name), tensors[first + name.split(".norm1.emb.")[1]]):
            raise ValueError(f"Expected the same embedders in all blocks, got {name} unlike block 0's.")

    # Rename the weights.
    names = diffusers_dit_names(config.num_layers, attention_bias=config.attention_bias)
    state_dict = rename(join_attention(tensors), names)
    check_tensors(state_dict)
    state_dict = drop_learned_variance(state_dict, in_channels=config.in_channels, num_pixels=config.patch_size**2)
    settings = {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "num_layers": config.num_layers,
        "in_channels": config.in_channels,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_embeds_ada_norm,
        "attention_bias": config.attention_bias,
        "ff_norm_eps": config.norm_eps,
        "freq_shift": 1,
    }
    return make_model(settings | {"routes": None, "objective": EpsilonObjective.name}, state_dict)
