# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Representation alignment (REPA, arXiv 2410.06940; iREPA, 2512.10794); inside a route, on the kept tokens.

Shapes: B batch, N tokens, K kept tokens, D the denoiser's width, E the encoder's.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...field_docs import with_field_docs
from ...routing import TokenRoute
from ...routing.ops import take_tokens
from .base import ForwardRecord, LossTerm
from .heads import GridHead
from .vision_encoder import VisionEncoder


@with_field_docs
@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentLoss(LossTerm):
    """weight * the mean over blocks and tokens of 1 - cos(projected token, feature of the clean image at its place).

    REPA (arXiv 2410.06940) uses -cos, which differs by a constant: the gradient is the same, and the loss here is 0
    when all is aligned. After a block inside a route that was taken, the mean is over the sample's kept tokens and the
    features at their places; otherwise over all tokens.

    Raises:
        ValueError: A field is out of range; or a block inside a route of tokens has a projector that uses neighbours.
    """

    wants_images: ClassVar[bool] = True

    encoder: VisionEncoder
    """The encoder whose features the tokens are compared with. It sees the images without noise, now or when its
    features were stored."""

    projectors: Mapping[int, nn.Module]
    """Block index to the projector of its tokens, D to E."""

    routes: tuple[TokenRoute, ...] = ()
    """The model's routes, in the order of `kept_token_ids`."""

    patch_size: int
    """The model's patch size."""

    weight: float = 0.5
    """At least 0; REPA uses 0.5."""

    until_step: int | None = None
    """Number of steps with alignment, at least 1; None for all. Afterwards the projectors run with zero gradient."""

    spatial_norm: float | None = None
    """gamma of iREPA's `normalize_features`, in [0, 1]; None for the features as they are."""

    def __post_init__(self):
        # Numbers.
        if not (isinstance(self.weight, (int, float)) and 0 <= self.weight < math.inf):
            raise ValueError(f"Expected weight to be a finite number >= 0, got {self.weight!r}. Use 0.5.")
        if self.until_step is not None and not (isinstance(self.until_step, int) and self.until_step >= 1):
            raise ValueError(f"Expected until_step >= 1, or null for all steps, got {self.until_step!r}.")
        gamma = self.spatial_norm
        if gamma is not None and not (isinstance(gamma, (int, float)) and 0 <= gamma <= 1):
            raise ValueError(f"Expected spatial_norm in [0, 1], or null for none, got {gamma!r}.")

        # Projectors that use neighbours.
        for block, projector in self.projectors.items():
            around = [route for route in self.routes if route.start <= block <= route.end and route.unit == "token"]
            if around and isinstance(projector, GridHead):
                raise ValueError(
                    f'Expected blocks outside of routes of tokens for the projector "conv", whose kept tokens have no '
                    f"neighbours, got {block} in the route {around[0].start} to {around[0].end}. Align at a block "
                    'outside of the route, route rows, or use the projector "mlp".'
                )

    @property
    def heads(self) -> Mapping[int, nn.Module]:
        return self.projectors

    @property
    def stored_features(self) -> Mapping[str, Any]:
        return {"encoder": self.encoder.identity(), "patch_size": self.patch_size}

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        encoder: str,
        blocks: Sequence[int],
        projector: str = "mlp",
        projector_dim: int | None = None,
        spatial_norm: float | None = None,
        weight: float = 0.5,
        until_step: int | None = None,
    ) -> "AlignmentLoss":
        """The term for a denoiser of patches, with new projectors.

        Args:
            model: A denoiser of this package.
            encoder: Repository on the Hub, or a folder, as for `VisionEncoder.from_pretrained`.
            blocks: Indices of the blocks, 0-based, after which tokens are aligned; REPA's depth 8 is 7 here.
            projector: "mlp", REPA's `make_projector`, or "conv", iREPA's `ConvProjector`.
            projector_dim: Width of the two hidden layers of "mlp"; None for 2048.
            spatial_norm: As the field.
            weight: As the field.
            until_step: As the field.

        Raises:
            ValueError: The model does not return its tokens; no such encoder or block exists; a value is out of range.
        """
        # Checks.
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
        if projector not in ("mlp", "conv"):
            raise ValueError(f"Expected projector 'mlp' or 'conv', got {projector!r}.")
        if projector_dim is not None and not (isinstance(projector_dim, int) and projector_dim >= 1):
            raise ValueError(f"Expected projector_dim >= 1, got {projector_dim!r}. Use 2048.")
        if projector_dim is not None and projector == "conv":
            raise ValueError(f'Expected no projector_dim for "conv", which has no hidden layer, got {projector_dim}.')

        # Encoder and projectors.
        teacher, width = VisionEncoder.from_pretrained(encoder), model.patch_embedding.out_channels
        make = ConvProjector if projector == "conv" else partial(make_projector, hidden_dim=projector_dim or 2048)
        return cls(
            encoder=teacher,
            projectors={block: make(width, out_dim=teacher.width) for block in blocks},
            routes=tuple(model.token_router.routes),
            patch_size=patch_size,
            weight=weight,
            until_step=until_step,
            spatial_norm=spatial_norm,
        )

    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        # Steps after the alignment has ended.
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

        # The encoder's features for all tokens, then for each block those of the tokens that went through it.
        features = self._features(record)  # B N E
        losses = []
        for block in self.projectors:
            ids = self._kept_token_ids(block, record)
            target = features if ids is None else take_tokens(features, ids)  # B K E
            losses.append(1 - F.cosine_similarity(projected[block].float(), target, dim=-1).mean(dim=1))
        return self.weight * torch.stack(losses).mean(dim=0)

    def _features(self, record: ForwardRecord) -> torch.Tensor:
        """[B, N, E] float32: the stored features, else those of the images; normalised if `spatial_norm` is set."""
        features = record.image_features
        if features is None:
            if record.images is None:
                raise ValueError("Expected the images of the latents, which the alignment looks at, got none.")
            grid_size = tuple(side // self.patch_size for side in record.latents.shape[2:])
            features = self.encoder(record.images, grid_size)
        features = features.float()
        return features if self.spatial_norm is None else normalize_features(features, gamma=self.spatial_norm)

    def _kept_token_ids(self, block: int, record: ForwardRecord) -> torch.Tensor | None:
        """[B, K], the kept tokens of the route around a block; None if all tokens went through it."""
        for route, ids in zip(self.routes, record.kept_token_ids or (), strict=False):
            if route.start <= block <= route.end:
                return ids
        return None


def normalize_features(features: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """iREPA's spatial normalisation (arXiv 2512.10794) of each channel over all tokens of an image, routed or not.

    Args:
        features: [B, N, E], N at least 2.
        gamma: Share of the mean that is subtracted, to reduce what all tokens of the image have in common.

    Returns:
        [B, N, E], (x - gamma mean(x)) / (std(x) + 1e-6), with the unbiased standard deviation.
    """
    mean, std = features.mean(dim=1, keepdim=True), features.std(dim=1, keepdim=True)  # B 1 E
    return (features - gamma * mean) / (std + 1e-6)


class ConvProjector(GridHead):
    """iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the grid of tokens, padded with zeros.

    In a route of rows the grid consists of the kept rows: each is adjacent to the next kept row above and below, as
    in the blocks of such a route.

    Args:
        width: D.
        out_dim: E.
    """

    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(width, out_dim, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor, columns: int) -> torch.Tensor:
        """[B, rows * columns, D] to [B, rows * columns, E], both row by row."""
        maps = tokens.transpose(1, 2).unflatten(2, (-1, columns))  # B D rows columns
        return self.conv(maps).flatten(2).transpose(1, 2)


def make_projector(width: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """REPA's projector: three layers with SiLU between them, applied per token; Xavier weights, biases start at 0."""
    layers: list[Any] = [nn.Linear(width, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()]
    layers += [nn.Linear(hidden_dim, out_dim)]
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
