# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The class-conditional diffusion transformer of DiT (arXiv 2212.09748) with token routes (TREAD, arXiv 2501.04765).

Shapes: B batch, C latent channels, H and W latent size, P patch size, N = (H / P) * (W / P) tokens, K kept tokens,
D width (heads * head dim).
"""

import warnings
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..routing import RoutedStack
from .latent_denoiser import LatentDenoiser, Routes


# DiT, table 1:  width, blocks, heads. The patch size follows the slash: "XL/2". Parameters at patch 2, 4 channels,
# 1000 classes: S 33M, B 130M, L 458M, XL 675M.
PRESETS = {
    "S":  ( 384,     12,     6),
    "B":  ( 768,     12,    12),
    "L":  (1024,     24,    16),
    "XL": (1152,     28,    16),
}  # fmt: skip


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
    is_cross_attention = False
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


# What diffusers' caches, layer skipping and perturbed attention ask of a block. The tables have no public name, and
# their `register` first imports all of diffusers' transformers:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/hooks/_helpers.py
TransformerBlockRegistry._registry[TREADTransformerBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, _cls=TREADTransformerBlock
)
AttentionProcessorRegistry._registry[TREADAttnProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=lambda attn, hidden_states: hidden_states
)


class TREADTransformer2DModel(LatentDenoiser, AttentionMixin):
    r"""DiT whose middle blocks can be skipped by a random share of the tokens.

    In training mode the tokens take the routes; in evaluation mode the model is dense, unless `token_routing` asks for
    a ratio. Everything about routing is in `get_token_router(model)`. At initialisation the output is exactly 0.

    Args:
        num_attention_heads: Number of attention heads.
        attention_head_dim: Channels of a head; the width D is their product. At least 4 and D divisible by 4.
        num_layers: Number of blocks.
        in_channels: Channels C of the latents (4 for the SD VAE, 16 for Flux's, 1 or 3 for pixels).
        out_channels: Channels of the prediction; None for `in_channels`.
        sample_size: Height and width of the training latents; any other size divisible by `patch_size` works too, its
            positions are scaled to the same range.
        patch_size: P, latent pixels on a token's side.
        num_classes: Number of classes. Index `num_classes` is the null class of classifier-free guidance; 0 makes an
            unconditional model.
        routes: The token routes: "default" for `default_route(num_layers)`, a list of `TokenRoute` or of their
            mappings, None for a model without routing. Kept in the config as mappings with absolute indices.
        timestep_scale: The timestep is multiplied by it before the sinusoidal embedding, whose period is made for
            [0, 1000]. The paper feeds EDM's ln(sigma) / 4 as it is: 1.0. Flow schedulers give sigma * 1000: 1.0 too.
        objective: What the weights are trained for, a name of `diffusers_tread.objectives`: EDM's denoising as in the
            paper, flow matching, or DDPM's noise prediction as in DiT. Losses and schedulers of another are refused;
            that the name is known, they check and not the constructor.
        mlp_ratio: Width of the feed-forward layer over D.
        attention_bias: Whether query, key and value have a bias.
        norm_eps: Epsilon of the layer norms.
        ff_norm_eps: Epsilon of the norm before the feed-forward layer; None for `norm_eps`. diffusers' own DiT has
            1e-5 here and 1e-6 elsewhere.
        freq_shift: The timestep's frequencies are 10000^(-i / (128 - freq_shift)): 0 as in the papers, 1 as in
            diffusers' own DiT.

    Raises:
        ValueError: An argument out of range; routes as `resolve_routes`.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADTransformer2DModel
        >>> model = TREADTransformer2DModel.from_preset("S/2", sample_size=32, in_channels=4, num_classes=1000)
        >>> model(torch.randn(2, 4, 32, 32), torch.tensor([0.1, -0.5]), torch.tensor([207, 1000])).sample.shape
        torch.Size([2, 4, 32, 32])
    """

    # Of a dense forward; a routed one is refused. The classes have no public name:
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/_modeling_parallel.py
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    _presets = {
        f"{size}/{patch}": {
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "num_layers": num_layers,
            "patch_size": patch,
        }
        for size, (dim, num_layers, heads) in PRESETS.items()
        for patch in (2, 4, 8)
    }
    _no_split_modules = ["TREADTransformerBlock"]
    _repeated_blocks = ["TREADTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        in_channels: int = 4,
        out_channels: int | None = None,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        routes: Routes = "default",
        timestep_scale: float = 1.0,
        objective: str = "edm",
        mlp_ratio: float = 4.0,
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        ff_norm_eps: float | None = None,
        freq_shift: int = 0,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self._make_input(dim)
        blocks = [
            TREADTransformerBlock(
                dim,
                heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                attention_bias=attention_bias,
                norm_eps=norm_eps,
                ff_norm_eps=norm_eps if ff_norm_eps is None else ff_norm_eps,
            )
            for _ in range(num_layers)
        ]
        self.transformer_blocks = RoutedStack(blocks)
        self._make_output(dim)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As diffusers' method, for LoRA and other adapters of PEFT.

        The linear layers of a block are called `to_qkv` (query, key and value), `to_out.0`, `ff.net.0.proj`,
        `ff.net.2` and `modulation`.

        Warns:
            UserWarning: The adapter reaches the attention's output but not query, key and value, as one does whose
                targets name these apart.
        """
        super().add_adapter(adapter_config, adapter_name)
        adapted = {name.split(f".{adapter_name}.")[0] for name in self.state_dict() if f".{adapter_name}." in name}
        if any(".to_out.0." in name for name in adapted) and not any(".to_qkv." in name for name in adapted):
            warnings.warn(
                "The adapter reaches 'to_out.0', but neither query, key nor value: they are one layer here, 'to_qkv'. "
                'Use target_modules=["to_qkv", "to_out.0"].',
                stacklevel=2,
            )
