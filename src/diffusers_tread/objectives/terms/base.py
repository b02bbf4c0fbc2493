# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The interface of loss terms, and the record of a forward that they are computed from.

Shapes: B batch, C channels, H and W latent size, N tokens, K kept tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from ...field_docs import with_field_docs


@with_field_docs
@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardRecord:
    """One training forward: inputs, target and outputs."""

    latents: torch.Tensor
    """[B, C, H, W], the clean latents, in their original dtype."""

    noisy: torch.Tensor
    """[B, C, H, W] float32, the noisy latents, not scaled for the network."""

    timestep: torch.Tensor
    """[B] float32, the network's timestep."""

    target: torch.Tensor
    """[B, C, H, W] float32, the target of the prediction."""

    prediction: torch.Tensor
    """[B, C, H, W] float32, the prediction."""

    denoise: Callable[[torch.Tensor], torch.Tensor]
    """Maps a prediction to the clean latents that it implies, [B, C, H, W] float32."""

    conditions: dict[str, Any]
    """The denoiser's conditions, such as `class_labels`."""

    kept_token_ids: list[torch.Tensor | None] | None = None
    """Per route [B, K] int64, or None for a route not taken; None for a dense forward."""

    hidden_states: dict[int, torch.Tensor] | None = None
    """The tokens after the blocks of `LossTerm.hidden_states_at`: [B, N, D], inside a route [B, K, D]."""

    projected_states: dict[int, torch.Tensor] | None = None
    """The outputs of `LossTerm.heads` on the tokens after their blocks: [B, N, ...], inside a route [B, K, ...]."""

    images: torch.Tensor | None = None
    """[B, 3 or 1, height, width] in [-1, 1], the images of the latents, for terms that need them."""

    image_features: torch.Tensor | None = None
    """[B, N, E], stored features of the images, as described by `LossTerm.stored_features`, instead of `images`."""

    step: int | None = None
    """Optimiser steps done before this one, if known."""


class LossTerm(ABC):
    """A term that `Objective.loss` adds to the denoising loss.

    A term of your own is a subclass in one file and one line `register_loss_term("name", MyTerm)`.
    """

    hidden_states_at: tuple[int, ...] = ()
    """Indices of the blocks whose output the term needs in the record."""

    heads: Mapping[int, torch.nn.Module] = MappingProxyType({})
    """Block index to a network on the block's tokens, which is trained with the denoiser but not saved with it.
    `DenoiserWithHeads` calls it; one that uses a token's neighbours is a `GridHead`."""

    wants_images: ClassVar[bool] = False
    """Whether the term uses the record's `images` or, if it has `stored_features`, its `image_features`."""

    stored_features: Mapping[str, Any] | None = None
    """Which `image_features` may replace `images`: the identity of the `encoder` and the `patch_size` of the tokens;
    None if only images will do."""

    replaces_denoising: ClassVar[bool] = False
    """Whether the term includes the denoising loss, so that it is not added again."""

    @classmethod
    @abstractmethod
    def for_model(cls, model: torch.nn.Module, **settings: Any) -> "LossTerm":
        """The term for a denoiser that is not wrapped.

        Raises:
            ValueError: The model cannot be trained with it.
        """

    @abstractmethod
    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        """The loss of each sample, [B] float32."""
