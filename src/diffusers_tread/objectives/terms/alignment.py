# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Representation alignment (REPA, arXiv 2410.06940), in a route on the kept tokens.

Shapes: B batch, N tokens, K kept tokens, D the denoiser's width, E the encoder's.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...field_docs import with_field_docs
from ...routing import TokenRoute
from ...routing.ops import take_tokens
from .base import ForwardRecord, LossTerm
from .vision_encoder import VisionEncoder


@with_field_docs
@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentLoss(LossTerm):
    """weight * the mean over blocks and tokens of 1 - cos(projected token, feature of the clean image at its place).

    REPA (arXiv 2410.06940) has -cos, which differs by a constant: the gradient is the same, and nothing is
    added where all is aligned. After a block in a route that was taken the mean is over the tokens that the sample
    keeps, with the features at their places; else over all.

    Raises:
        ValueError: A field out of range.
    """

    wants_images: ClassVar[bool] = True

    encoder: VisionEncoder
    """What the tokens are compared with; it sees the images without noise."""

    projectors: Mapping[int, nn.Module]
    """By the index of a block the projector of its tokens, D to E."""

    routes: tuple[TokenRoute, ...] = ()
    """The model's, in the order of `kept_token_ids`."""

    patch_size: int
    """Of the model."""

    weight: float = 0.5
    """At least 0; REPA has 0.5."""

    until_step: int | None = None
    """Steps with alignment, at least 1; None for all. The projectors go on without a gradient."""

    def __post_init__(self):
        if not (isinstance(self.weight, (int, float)) and 0 <= self.weight < math.inf):
            raise ValueError(f"Expected weight to be a finite number >= 0, got {self.weight!r}. Use 0.5.")
        if self.until_step is not None and not (isinstance(self.until_step, int) and self.until_step >= 1):
            raise ValueError(f"Expected until_step >= 1, or null for all steps, got {self.until_step!r}.")

    @property
    def heads(self) -> Mapping[int, nn.Module]:
        return self.projectors

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        encoder: str,
        blocks: Sequence[int],
        projector_dim: int = 2048,
        weight: float = 0.5,
        until_step: int | None = None,
    ) -> "AlignmentLoss":
        """The term for a denoiser of patches, with new projectors.

        Args:
            model: Of this package.
            encoder: Repository on the Hub, or a folder, as `VisionEncoder.from_pretrained` takes it.
            blocks: Indices of the blocks, 0-based, after which tokens are aligned; REPA's depth 8 is 7 here.
            projector_dim: Width of the projectors' two hidden layers.
            weight: As the field.
            until_step: As the field.

        Raises:
            ValueError: The model does not give its tokens; there is no such encoder or block; a value out of range.
        """
        config: Any = getattr(model, "config", {})
        num_layers, patch_size = (config.get(name) for name in ("num_layers", "patch_size"))
        gives_tokens = "hidden_states_at" in inspect.signature(model.forward).parameters
        if not gives_tokens or None in (num_layers, patch_size) or not hasattr(model, "patch_embedding"):
            raise ValueError(
                f"Expected a denoiser of this package with patches for the alignment, got {type(model).__name__}. "
                "Leave the term out."
            )
        if not blocks or len(set(blocks)) < len(blocks) or not set(blocks) <= set(range(num_layers)):
            raise ValueError(f"Expected different blocks among 0 to {num_layers - 1} to align, got {blocks}.")
        if not (isinstance(projector_dim, int) and projector_dim >= 1):
            raise ValueError(f"Expected projector_dim >= 1, got {projector_dim!r}. Use 2048.")
        teacher, width = VisionEncoder.from_pretrained(encoder), model.patch_embedding.out_channels
        return cls(
            encoder=teacher,
            projectors={block: make_projector(width, projector_dim, teacher.width) for block in blocks},
            routes=tuple(model.token_router.routes),
            patch_size=patch_size,
            weight=weight,
            until_step=until_step,
        )

    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        projected = record.projected_states
        if projected is None:
            raise ValueError("Expected a DenoiserWithHeads, which has the projectors of the alignment, got none.")
        if self.until_step is not None and record.step is None:
            raise ValueError(
                f"Expected the step of the training for until_step={self.until_step}, got none. Give step=."
            )
        if self.until_step is not None and (record.step or 0) >= self.until_step:
            means = [projected[block].float().mean(dim=(1, 2)) for block in self.projectors]
            return 0.0 * torch.stack(means).sum(dim=0)
        if record.images is None:
            raise ValueError("Expected the images of the latents, which the alignment looks at, got none.")

        # The encoder's feature for each token, then per block those of the tokens that went through it.
        grid_size = tuple(side // self.patch_size for side in record.latents.shape[2:])
        features = self.encoder(record.images, grid_size)  # B N E
        losses = []
        for block in self.projectors:
            ids = self._kept_token_ids(block, record)
            target = features if ids is None else take_tokens(features, ids)  # B K E
            losses.append(1 - F.cosine_similarity(projected[block].float(), target, dim=-1).mean(dim=1))
        return self.weight * torch.stack(losses).mean(dim=0)

    def _kept_token_ids(self, block: int, record: ForwardRecord) -> torch.Tensor | None:
        """[B, K], those of the route around a block; None where all tokens went through it."""
        for route, ids in zip(self.routes, record.kept_token_ids or (), strict=False):
            if route.start <= block <= route.end:
                return ids
        return None


def make_projector(width: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """REPA's: three layers with SiLU between them, for each token by itself; Xavier's weights, no biases at first."""
    layers: list[Any] = [nn.Linear(width, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()]
    layers += [nn.Linear(hidden_dim, out_dim)]
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
