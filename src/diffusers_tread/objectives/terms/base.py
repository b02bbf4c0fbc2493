# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a loss is computed from, and what a term of a loss is.

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
    """One training forward: what went in, what should come out and what came out."""

    latents: torch.Tensor
    """[B, C, H, W], the clean latents, in the dtype they came in."""

    noisy: torch.Tensor
    """[B, C, H, W] float32, the latents with their noise, not scaled for the network."""

    timestep: torch.Tensor
    """[B] float32, as the network got it."""

    target: torch.Tensor
    """[B, C, H, W] float32, what the network should predict."""

    prediction: torch.Tensor
    """[B, C, H, W] float32, what it predicted."""

    denoise: Callable[[torch.Tensor], torch.Tensor]
    """Maps a prediction to the clean latents that it stands for, [B, C, H, W] float32."""

    conditions: dict[str, Any]
    """What the denoiser was conditioned on, such as `class_labels`."""

    kept_token_ids: list[torch.Tensor | None] | None = None
    """Per route [B, K] int64, or None for a route not taken; None for a dense forward."""

    hidden_states: dict[int, torch.Tensor] | None = None
    """The tokens after the blocks of `LossTerm.hidden_states_at`: [B, N, D], inside a route [B, K, D]."""

    projected_states: dict[int, torch.Tensor] | None = None
    """What the networks of `LossTerm.heads` made of the tokens after their blocks: [B, N, ...], inside a route
    [B, K, ...]."""

    images: torch.Tensor | None = None
    """[B, 3 or 1, height, width] in [-1, 1], the images that the latents are of, for terms that want them."""

    image_features: torch.Tensor | None = None
    """[B, N, E], what `LossTerm.stored_features` describes, which was stored of the images, instead of `images`."""

    step: int | None = None
    """Optimiser steps done before this one, if told."""


class LossTerm(ABC):
    """A term that `Objective.loss` adds to the denoising loss.

    A term of your own is a subclass in one file and one line `register_loss_term("name", MyTerm)`.
    """

    hidden_states_at: tuple[int, ...] = ()
    """Indices of the blocks whose output the term wants in the record."""

    heads: Mapping[int, torch.nn.Module] = MappingProxyType({})
    """By the index of the block: a network on the block's tokens that is trained with the denoiser and not saved with
    it. `DenoiserWithHeads` calls it; one that looks at neighbours is a `GridHead`."""

    wants_images: ClassVar[bool] = False
    """Whether the term looks at the record's `images`, or at its `image_features` where it has `stored_features`."""

    stored_features: Mapping[str, Any] | None = None
    """What `image_features` must be to do instead of `images`: the identity of the `encoder` and the `patch_size` of
    the tokens; None if only images do."""

    replaces_denoising: ClassVar[bool] = False
    """Whether the term has the denoising loss in it, so that it is not added once more."""

    @classmethod
    @abstractmethod
    def for_model(cls, model: torch.nn.Module, **settings: Any) -> "LossTerm":
        """The term for a denoiser, not wrapped.

        Raises:
            ValueError: The model cannot be trained with it.
        """

    @abstractmethod
    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        """[B] float32, of each sample."""
