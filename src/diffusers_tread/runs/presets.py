# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Recipes: the settings of a whole run under one name, such as `--recipe imagenet256_xl2`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..objectives import EDMObjective, FlowMatchingObjective, JiTObjective
from .config import TrainConfig
from .parsing import parse_config


# Common to all recipes: bfloat16, EMA, label dropout, ImageNet with random flips, no weight decay.
_COMMON = {
    "num_classes": 1000, "random_flip": True, "class_dropout_prob": 0.1, "adam_weight_decay": 0.0, "use_ema": True,
    "ema_decay": 0.9999, "mixed_precision": "bf16", "checkpointing_steps": 10_000, "checkpoints_total_limit": 3,
    "validation_steps": 10_000, "dense_fraction": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A run of the TREAD paper (arXiv 2501.04765), or a similar one, on eight processes."""

    preset: str
    """Size of the model."""
    resolution: int
    """Side of the images in pixels."""
    on_latents: bool
    """Whether the model is trained on 4-channel latents with an eighth of the resolution, or on pixels."""
    batch_size: int
    """Images per optimiser step, over all processes."""
    max_train_steps: int
    """Optimiser steps."""
    learning_rate: float
    """Constant learning rate of AdamW."""
    paper_fid_dense: float | None
    """FID without routing from the paper: 50,000 unguided samples (10,000 at 512); None if the paper has none."""
    paper_fid_tread: float | None
    """FID with routing from the paper, likewise."""
    was_run: bool
    """Whether the recipe has been run with this package."""

    def settings(self) -> dict[str, Any]:
        """Values for the fields of `TrainConfig`."""
        name = f"imagenet{self.resolution}"
        data = f"latents:{name}-latents" if self.on_latents else "hub:ILSVRC/imagenet-1k"
        return _COMMON | {
            "objective": EDMObjective.name,
            "max_grad_norm": 0.0,
            "data": data,
            "resolution": self.resolution,
            "preset": self.preset,
            "train_batch_size": self.batch_size // 8,
            "max_train_steps": self.max_train_steps,
            "learning_rate": self.learning_rate,
            "dataloader_num_workers": 0 if self.on_latents else 8,
            "gradient_checkpointing": self.resolution == 512 and self.preset == "XL/2",
        }


@dataclass(frozen=True)
class BorrowedRecipe:
    """The settings of another paper with TREAD's default route, on eight processes. None has been run here."""

    preset: str
    """Kind and size of the model."""
    vae: str | None
    """VAE that encodes the images during training; None for stored latents, or pixels."""
    data: str
    """As `TrainConfig.data`."""
    batch_size: int
    """Images per optimiser step, over all processes."""
    max_train_steps: int
    """Optimiser steps."""
    learning_rate: float
    """Learning rate of AdamW, constant after the warm-up."""
    adam_beta2: float
    """As `TrainConfig.adam_beta2`."""
    max_grad_norm: float
    """Norm to which gradients are clipped; 0 for no clipping."""
    aligned_block: int | None
    """Block (0-based) after which tokens are aligned with DINOv2-B; None for no alignment."""
    source_fid: float
    """FID that the source reports for its own run, which differs from this one, see docs/imagenet.md."""
    more: Mapping[str, Any]
    """Further fields of `TrainConfig`, the objective among them."""

    def settings(self) -> dict[str, Any]:
        """Values for the fields of `TrainConfig`."""
        alignment = {"encoder": "facebook/dinov2-base", "blocks": [self.aligned_block], "weight": 0.5}
        terms = {} if self.aligned_block is None else {"alignment": alignment}
        settings = {name: getattr(self, name) for name in ("preset", "data", "max_train_steps", "learning_rate")}
        settings |= {name: getattr(self, name) for name in ("adam_beta2", "max_grad_norm")}
        settings |= {"resolution": 256, "train_batch_size": self.batch_size // 8, "loss_terms": json.dumps(terms)}
        settings |= {"pretrained_vae_name_or_path": self.vae}
        settings["dataloader_num_workers"] = 0 if self.data.startswith("latents:") else 8
        return _COMMON | settings | dict(self.more)


_SD_VAE, _INVAE = "stabilityai/sd-vae-ft-ema", "REPA-E/e2e-invae-hf"
_IMAGENET, _VAVAE = "hub:ILSVRC/imagenet-1k", "latents:imagenet256-vavae-latents"
_FLOW = {"objective": FlowMatchingObjective.name}
_REPA = _FLOW | {"objective_config": '{"weighting_scheme": "uniform"}'}
_SRDIT = _FLOW | {
    "objective_config": '{"weighting_scheme": "uniform", "shift": "auto"}',
    "preset_config": '{"qk_norm": "rms_norm", "ffn": "gelu-approximate", "value_residual": true}',
}
_JIT = {"objective": JiTObjective.name, "lr_warmup_steps": 6_255}  # five epochs

# fmt: off
BORROWED = {
    # recipe:  model               VAE      data       batch steps    rate  beta2  clip aligned the source's FID
    "imagenet256_srdit_b1": BorrowedRecipe(
              "LightningDiT-B/1",  _INVAE,  _IMAGENET, 256,  400_000, 1e-4, 0.999, 1.0, 1,    3.49, _SRDIT),
    "imagenet256_lightningdit_xl1": BorrowedRecipe(
              "LightningDiT-XL/1", None,    _VAVAE,    1024, 80_000,  2e-4, 0.95,  1.0, None, 3.71, _FLOW),
    "imagenet256_repa_xl2": BorrowedRecipe(
              "XL/2",              _SD_VAE, _IMAGENET, 256,  400_000, 1e-4, 0.999, 1.0, 7,    7.9,  _REPA),
    "imagenet256_jit_b16": BorrowedRecipe(
              "JiT-B/16",          None,    _IMAGENET, 1024, 250_000, 2e-4, 0.95,  0.0, None, 5.44, _JIT),
}
RECIPES = {
    # name                            model  pixels latents batch  steps   rate   FID: dense routed run here
    "imagenet256_s2":       Recipe("S/2",   256,   True,   256, 400_000, 1e-4, 68.40, 47.04, False),
    "imagenet256_b2":       Recipe("B/2",   256,   True,   256, 400_000, 1e-4, 43.47, 21.34, False),
    "imagenet256_l2":       Recipe("L/2",   256,   True,   256, 400_000, 1e-4, 23.33, 9.10,  False),
    "imagenet256_xl2":      Recipe("XL/2",  256,   True,   256, 400_000, 1e-4, 19.47, 7.38,  False),
    "imagenet512_b2":       Recipe("B/2",   512,   True,   256, 400_000, 1e-4, 62.8,  40.9,  False),
    "imagenet512_xl2":      Recipe("XL/2",  512,   True,   256, 400_000, 1e-4, None,  None,  False),
    "imagenet64_pixels_b4": Recipe("B/4",   64,    False,  256, 400_000, 1e-4, None,  None,  False),
}
# fmt: on

# A first run: scikit-learn's 8x8 digits as pixels, 64 tokens. It is JSON, as in a config file.
DIGITS = """{
  "data": "digits:",
  "model_config_name_or_path": {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 12, "patch_size": 1},
  "train_batch_size": 16, "max_train_steps": 2000, "validation_steps": 500, "use_ema": true, "ema_decay": 0.99,
  "learning_rate": 0.005, "lr_scheduler": "cosine", "lr_warmup_steps": 30, "adam_beta2": 0.99
}"""


def recipe_settings(name: str) -> dict[str, Any]:
    """The values of a recipe for the fields of `TrainConfig`.

    Raises:
        ValueError: There is no such recipe.
    """
    recipes = RECIPES | BORROWED
    if name not in recipes:
        raise ValueError(f"Expected a recipe among {list(recipes)}, got {name!r}.")
    return recipes[name].settings()


def parse_train_config(
    argv: Sequence[str] | None = None, *, description: str | None = None, default_config: str | Path | None = None
) -> TrainConfig:
    """Parses a command line into a `TrainConfig`, see `parse_config`."""
    return parse_config(
        TrainConfig, argv, description=description, recipe_settings=recipe_settings, default_config=default_config
    )
