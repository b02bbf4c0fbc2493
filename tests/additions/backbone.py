# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A backbone in one file: blocks that mix tokens by their mean instead of attention."""

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from diffusers_tread import RoutedStack, TokenRouter, register_denoiser
from diffusers_tread.models import DenoiserOutput


class MeanBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mean = tokens.mean(dim=1, keepdim=True)  # B 1 D
        return tokens + self.mlp(self.norm(tokens + mean + positions + conditioning.unsqueeze(1)))


class MeanDenoiser(ModelMixin, ConfigMixin):
    """Each pixel is a token."""

    _supports_prefix = True

    @register_to_config
    def __init__(
        self,
        dim: int = 16,
        num_layers: int = 6,
        in_channels: int = 1,
        sample_size: int = 8,
        num_classes: int = 10,
        routes: "list | None" = None,
        objective: str = "flow",
    ):
        super().__init__()
        self.token_router = TokenRouter(routes, num_layers=num_layers)
        self.embedding, self.output = nn.Linear(in_channels, dim), nn.Linear(dim, in_channels)
        self.positions = nn.Parameter(0.02 * torch.randn(1, sample_size**2, dim))
        self.time, self.classes = nn.Linear(1, dim), nn.Embedding(num_classes + 1, dim)
        self.blocks = RoutedStack([MeanBlock(dim) for _ in range(num_layers)])

    def forward(
        self, hidden_states, timestep, class_labels=None, return_dict=True, *, routing=None, prefix=None,
        return_prefix=False, hidden_states_at=(),
    ):  # fmt: skip
        batch_size, _, height, width = hidden_states.shape
        timestep = torch.as_tensor(timestep, device=hidden_states.device, dtype=hidden_states.dtype)
        conditioning = self.time(timestep.expand(batch_size).unsqueeze(1) / 1000)  # B D
        if class_labels is not None:
            conditioning = conditioning + self.classes(class_labels)
        tokens = self.embedding(hidden_states.flatten(2).transpose(1, 2))  # B N D
        kept = self.token_router.plan(tokens, training=self.training, call=routing)
        tokens, prefix, hidden = self.blocks(
            tokens, conditioning, routes=self.token_router.routes, kept_token_ids=kept, per_token=[self.positions],
            prefix=prefix, return_prefix=return_prefix, hidden_states_at=hidden_states_at,
        )  # fmt: skip
        sample = self.output(tokens).transpose(1, 2).unflatten(2, (height, width))
        output = DenoiserOutput(
            sample=sample, kept_token_ids=kept, prefix=prefix if return_prefix else None, hidden_states=hidden or None
        )
        return output if return_dict else output.to_tuple()


register_denoiser(MeanDenoiser)
