# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The denoisers by class name: those that can be trained from a preset or config, exported, and loaded.

A denoiser is a diffusers `ModelMixin` with:

- in its config `in_channels`, `sample_size` (height and width of the training latents), `num_classes` (0:
  unconditional) and `objective` (a name of `diffusers_tread.objectives`);
- `forward(hidden_states [B, C, H, W], timestep [B], class_labels=[B], return_dict=True, *, routing=None,
  hidden_states_at=())`, which returns a `DenoiserOutput`;
- `token_router`, a `TokenRouter`, with or without routes;
- if it has named sizes, `presets()` and `from_preset(name, **config)`.
"""

from typing import Any

from diffusers import ModelMixin

from ..registry import add_entry
from .mamba_tread_2d import TREADMamba2DModel
from .rwkv_tread_2d import TREADRWKV2DModel
from .transformer_tread_2d import TREADTransformer2DModel


DENOISERS: dict[str, type[ModelMixin]] = {}


def register_denoiser(denoiser: type[ModelMixin]) -> None:
    """Registers a denoiser of your own for the training script, `TREADPipeline` and the Hub.

    Raises:
        ValueError: Another denoiser has this name, or a preset of the same name.
    """
    others = {name: kind for name, kind in _presets().items() if kind is not denoiser}
    if taken := sorted(others.keys() & set(getattr(denoiser, "presets", list)())):
        raise ValueError(f"Expected new names of presets, got {taken}, those of {others[taken[0]].__name__}.")
    add_entry(DENOISERS, denoiser.__name__, denoiser)


def make_denoiser(preset_or_class: str, **config: Any) -> ModelMixin:
    """A new denoiser from a preset, such as "XL/2", or of the class with this name.

    Raises:
        ValueError: As `denoiser_class` and the class.
    """
    kind = denoiser_class(preset_or_class)
    return kind(**config) if preset_or_class in DENOISERS else kind.from_preset(preset_or_class, **config)


def denoiser_class(preset_or_class: str) -> type[ModelMixin]:
    """The class of a preset, or the class with this name.

    Raises:
        ValueError: No preset or class has this name.
    """
    kinds = _presets() | DENOISERS
    if preset_or_class not in kinds:
        raise ValueError(
            f"Expected a preset among {list(_presets())}, or a class among {list(DENOISERS)}, got {preset_or_class!r}."
        )
    return kinds[preset_or_class]


def _presets() -> dict[str, type[ModelMixin]]:
    return {name: kind for kind in DENOISERS.values() for name in getattr(kind, "presets", list)()}


register_denoiser(TREADTransformer2DModel)
register_denoiser(TREADMamba2DModel)
register_denoiser(TREADRWKV2DModel)
