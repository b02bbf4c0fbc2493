# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The transformer block of DiT with adaLN-Zero (arXiv 2212.09748).

Shapes: B batch, N tokens, D width (heads * head dim).
"""

import torch
import torch.nn as nn
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn


class TREADAttnProcessor:
    """Self-attention through diffusers' attention dispatcher; the backend is chosen by `set_attention_backend`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "TREADAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, D]."""
        qkv = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1))  # B N 3 heads D/heads
        query, key, value = qkv.unbind(2)
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](out.flatten(2, 3))


class TREADAttention(nn.Module, AttentionModuleMixin):
    """Self-attention; query, key and value are one matrix product, rows after rows of `to_qkv`."""

    _default_processor_cls = TREADAttnProcessor
    _available_processors = [TREADAttnProcessor]
    _supports_qkv_fusion = False  # they always are

    def __init__(self, dim: int, *, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(TREADAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class TREADTransformerBlock(nn.Module):
    """A DiT block with adaLN-Zero (arXiv 2212.09748, figure 3)."""

    def __init__(
        self, dim: int, *, heads: int, mlp_ratio: float, attention_bias: bool, norm_eps: float, ff_norm_eps: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = TREADAttention(dim, heads=heads, bias=attention_bias)
        self.norm2 = nn.LayerNorm(dim, eps=ff_norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: [B, N, D] or the kept tokens [B, K, D]; the block does not depend on which.
            conditioning: [B, D], SiLU of the embedded time and class.

        Returns:
            The shape of `hidden_states`.
        """
        modulation = self.modulation(conditioning).unsqueeze(1)  # B 1 6D
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)

        attn_input = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
        hidden_states = torch.addcmul(hidden_states, gate_attn, self.attn(attn_input))

        ff_input = torch.addcmul(shift_ff, self.norm2(hidden_states), 1 + scale_ff)
        return torch.addcmul(hidden_states, gate_ff, self.ff(ff_input))
