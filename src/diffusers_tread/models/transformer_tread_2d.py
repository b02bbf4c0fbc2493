# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The class-conditional diffusion transformer of DiT (arXiv 2212.09748) with token routes (TREAD, arXiv 2501.04765).

Options: RMSNorm, SwiGLU, rotary positions and normalised queries and keys as in LightningDiT (arXiv 2501.01423), and
the value residual of ResFormer (arXiv 2410.17897).

Shapes: B batch, C latent channels, H and W latent size, P patch size, N = (H / P) * (W / P) tokens, K kept tokens,
D width (heads * head dim).
"""

import warnings
from typing import Any, Literal

import torch
import torch.nn as nn
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
from ..typed_config import register_to_config
from .latent_denoiser import LatentDenoiser, Routes, sincos_positions


# DiT, table 1:  width, blocks, heads. The patch size follows the slash: "XL/2". Parameters at patch 2, 4 channels,
# 1000 classes: S 33M, B 130M, L 458M, XL 675M.
PRESETS = {
    "S":  ( 384,     12,     6),
    "B":  ( 768,     12,    12),
    "L":  (1024,     24,    16),
    "XL": (1152,     28,    16),
}  # fmt: skip
# LightningDiT: DiT's sizes with patch 1, on latents of a 16x autoencoder with 32 channels (arXiv 2501.01423). B/1 and
# XL/1 are published; S/1 and L/1 are derived.
LIGHTNING = {
    "sample_size": 16, "in_channels": 32, "norm": "rms_norm", "ffn": "swiglu", "positions": "sincos+rope",
}  # fmt: skip
# JiT: LightningDiT's blocks with normalised queries and keys on 256x256 pixels (arXiv 2511.13720), without the class
# tokens that the paper adds to the sequence. B/16 and L/16 are published; S/16 and XL/16 are derived.
JIT = LIGHTNING | {"sample_size": 256, "in_channels": 3, "qk_norm": "rms_norm", "patch_bottleneck_dim": 128}
_OPTIONS = {
    "norm": ("layer_norm", "rms_norm"),
    "qk_norm": (None, "rms_norm"),
    "ffn": ("gelu-approximate", "swiglu"),
    "positions": ("sincos", "rope", "sincos+rope"),
}


class TREADAttnProcessor:
    """Self-attention through diffusers' attention dispatcher; `set_attention_backend` chooses the backend."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "TREADAttention",
        hidden_states: torch.Tensor,
        rotary: torch.Tensor | None = None,
        first_values: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            attn: The attention's layers.
            hidden_states: [B, N, D].
            rotary: [B or 1, N, D / heads], `rotary_positions` of these tokens.
            first_values: [B, N, D], the values of these tokens in the first block.

        Returns:
            [B, N, D]; with a value residual also the block's own values, [B, N, D].
        """
        # Queries, keys and values.
        qkv = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1))  # B N 3 heads D/heads
        query, key, value = qkv.unbind(2)
        own_values = value

        # Norm, then rotation, as in LightningDiT. Under autocast the norms' weights are float32, and the fused norm
        # needs its input in that dtype.
        if attn.norm_q is not None and attn.norm_k is not None:
            dtype = attn.norm_q.weight.dtype
            query, key = attn.norm_q(query.to(dtype)).to(value.dtype), attn.norm_k(key.to(dtype)).to(value.dtype)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)

        # Value residual (arXiv 2410.17897, "learnable ResFormer" with one weight).
        if first_values is not None:
            first_values = first_values.unflatten(-1, (attn.heads, -1)).to(value.dtype)
            value = value + attn.first_value_share.to(value.dtype) * (first_values - value)

        # Attention.
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[0](out.flatten(2, 3))
        return (out, own_values.flatten(2, 3)) if attn.value_residual else out


class TREADAttention(nn.Module, AttentionModuleMixin):
    """Self-attention; query, key and value are one matrix product: blocks of rows of `to_qkv`, in this order.

    Args:
        dim: D, the width.
        heads: Number of heads.
        bias: Whether query, key and value have a bias.
        qk_norm: "rms_norm" normalises queries and keys head by head.
        eps: Epsilon of that norm.
        value_residual: Whether it also returns its values, and mixes the first block's values into them if given.
    """

    _default_processor_cls = TREADAttnProcessor
    _available_processors = [TREADAttnProcessor]
    is_cross_attention = False
    _supports_qkv_fusion = False  # always fused

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        bias: bool = True,
        qk_norm: str | None = None,
        eps: float = 1e-6,
        value_residual: bool = False,
    ):
        super().__init__()
        self.heads, self.value_residual = heads, value_residual
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.norm_q = None if qk_norm is None else make_norm(qk_norm, dim // heads, eps)
        self.norm_k = None if qk_norm is None else make_norm(qk_norm, dim // heads, eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.first_value_share: nn.Parameter | None = None
        self.set_processor(TREADAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, **per_token: torch.Tensor) -> Any:
        return self.processor(self, hidden_states, **per_token)


class TREADTransformerBlock(nn.Module):
    """A DiT block with adaLN-Zero (arXiv 2212.09748, figure 3)."""

    value_residual = False

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        mlp_ratio: float,
        attention_bias: bool,
        norm_eps: float,
        ff_norm_eps: float,
        norm: str = "layer_norm",
        qk_norm: str | None = None,
        ffn: str = "gelu-approximate",
    ):
        super().__init__()
        self.norm1 = make_norm(norm, dim, norm_eps)
        self.attn = TREADAttention(
            dim, heads=heads, bias=attention_bias, qk_norm=qk_norm, eps=norm_eps, value_residual=self.value_residual
        )
        self.norm2 = make_norm(norm, dim, ff_norm_eps)
        self.ff = FeedForward(dim, activation_fn=ffn, inner_dim=feed_forward_width(dim, mlp_ratio, ffn))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rotary: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: [B, N, D] or the kept tokens [B, K, D]; the block does not depend on which.
            conditioning: [B, D], SiLU of the embedded time and class.
            rotary: [B or 1, N, D / heads], `rotary_positions` of these tokens.
            encoder_hidden_states: With a value residual, the first block's values for these tokens, [B, N, D]; None in
                the first block itself. diffusers' caches need this name for what blocks pass on besides tokens.

        Returns:
            Tokens in the shape of `hidden_states`; with a value residual also the first block's values.
        """
        modulation = self.modulation(conditioning).unsqueeze(1)  # B 1 6D
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)

        # Attention.
        attn_input = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
        per_token = {} if rotary is None else {"rotary": rotary}
        if encoder_hidden_states is not None:
            per_token["first_values"] = encoder_hidden_states
        attended = self.attn(attn_input, **per_token)
        if self.value_residual:
            attended, own_values = attended
            first_values = own_values if encoder_hidden_states is None else encoder_hidden_states
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)

        # Feed-forward.
        ff_input = torch.addcmul(shift_ff, self.norm2(hidden_states), 1 + scale_ff)
        hidden_states = torch.addcmul(hidden_states, gate_ff, self.ff(ff_input))
        return (hidden_states, first_values) if self.value_residual else hidden_states


class TREADValueResidualBlock(TREADTransformerBlock):
    """A block that passes on the first block's values; a separate class, because diffusers' caches go by the class."""

    value_residual = True


def make_norm(norm: str, dim: int, eps: float) -> nn.Module:
    """DiT's layer norm, whose scale and shift come from the modulation, or RMSNorm with a learned scale."""
    if norm == "rms_norm":
        return nn.RMSNorm(dim, eps=eps)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)


def feed_forward_width(dim: int, mlp_ratio: float, ffn: str) -> int:
    """Hidden channels. SwiGLU has a third matrix, so two thirds as many, rounded down as in LightningDiT."""
    width = int(dim * mlp_ratio + 1e-6)  # for ratios that floats cannot represent, such as 960 / 704
    width = 2 * width // 3 if ffn == "swiglu" else width
    if width < 1:
        raise ValueError(f"Expected an mlp_ratio that leaves at least one hidden channel, got {mlp_ratio}.")
    return width


def rotary_positions(
    head_dim: int, height: int, width: int, *, base: int, device: "torch.device | str | None" = None
) -> torch.Tensor:
    """Cosines and sines of 2D rotary positions (RoFormer, arXiv 2104.09864; in two dimensions as EVA-02, 2303.11331).

    The angles are those of the sine-cosine positions, theta 10000: half of a head's pairs turn by the row, half by the
    column. Other sizes are scaled to the range of the training grid.

    Args:
        head_dim: Channels of a head, divisible by 4.
        height: Rows of tokens.
        width: Columns of tokens.
        base: Rows and columns are scaled to [0, base).
        device: Device of the result.

    Returns:
        [1, height * width, head_dim] float32: head_dim / 2 cosines, then as many sines; each with the row first.
    """
    table = sincos_positions(head_dim, height, width, base=base, device=device)  # N head_dim
    sin_column, cos_column, sin_row, cos_row = table.chunk(4, dim=1)
    return torch.cat([cos_row, cos_column, sin_row, sin_column], dim=1).unsqueeze(0)


def rotate(hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring channels (2 i, 2 i + 1) of [B, N, heads, head_dim] by the angle i of their token, in float32.

    LightningDiT does so too under autocast; in a bfloat16 model its tables are bfloat16, here they stay float32.
    """
    cos, sin = rotary.unsqueeze(2).chunk(2, dim=-1)  # B N 1 head_dim/2
    even, odd = hidden_states.float().unflatten(-1, (-1, 2)).unbind(-1)  # B N heads head_dim/2
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(hidden_states.dtype)


# What diffusers' caches, layer skipping and perturbed attention need to know of a block. The tables have no public
# name, and their `register` first imports all of diffusers' transformers:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/hooks/_helpers.py
TransformerBlockRegistry._registry[TREADTransformerBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, _cls=TREADTransformerBlock
)
TransformerBlockRegistry._registry[TREADValueResidualBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=1, _cls=TREADValueResidualBlock
)
AttentionProcessorRegistry._registry[TREADAttnProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=lambda attn, hidden_states, **per_token: (
        (hidden_states, per_token.get("first_values")) if attn.value_residual else hidden_states
    )
)


class TREADTransformer2DModel(LatentDenoiser, AttentionMixin):
    r"""DiT whose middle blocks can be skipped by a random share of the tokens.

    In training mode the tokens take the routes; in evaluation mode the model is dense, unless `token_routing` sets a
    ratio. `get_token_router(model)` holds the routing settings. At initialisation the output is exactly 0.

    Args:
        num_attention_heads: Number of attention heads.
        attention_head_dim: Channels of a head. The width D is heads times this; it is at least 4 and divisible by 4.
        num_layers: Number of blocks.
        in_channels: Channels C of the latents (4 for the SD VAE, 16 for Flux's, 1 or 3 for pixels).
        out_channels: Channels of the prediction; None for `in_channels`.
        sample_size: Height and width of the training latents. Any other size divisible by `patch_size` works too; its
            positions are scaled to the same range.
        patch_size: P, side of a token in latent pixels.
        num_classes: Number of classes. Index `num_classes` is the null class of classifier-free guidance; 0 makes an
            unconditional model.
        routes: The token routes: "default" for `default_route(num_layers)`, a list of `TokenRoute` or of their
            mappings, None for a model without routing. Stored in the config as mappings with absolute indices.
        timestep_scale: Factor on the timestep before the sinusoidal embedding, whose periods are meant for [0, 1000].
            The paper feeds EDM's ln(sigma) / 4 unscaled: 1.0. Flow schedulers give sigma * 1000: 1.0 too.
        objective: What the weights are trained for, a name of `diffusers_tread.objectives`: EDM's denoising as in the
            paper, flow matching, DDPM's noise prediction as in DiT, or JiT's clean images. Losses and schedulers
            refuse a model with another objective. They also check that the name is known; the constructor does not.
        mlp_ratio: Width of the feed-forward layer divided by D.
        attention_bias: Whether query, key and value have a bias.
        norm_eps: Epsilon of the norms.
        ff_norm_eps: Epsilon of the norm before the feed-forward layer; None for `norm_eps`. diffusers' own DiT uses
            1e-5 here and 1e-6 elsewhere.
        freq_shift: The timestep's frequencies are 10000^(-i / (128 - freq_shift)): 0 as in the papers, 1 as in
            diffusers' own DiT.
        norm: "layer_norm" as in DiT, or "rms_norm" with a learned scale.
        qk_norm: "rms_norm" normalises queries and keys head by head, with a learned scale.
        ffn: "gelu-approximate" as in DiT, or "swiglu" with two thirds of the width, rounded down.
        positions: "sincos" as in DiT, added to the patches; "rope", which rotates queries and keys in each block;
            "sincos+rope", both, as in LightningDiT. `attention_head_dim` must be divisible by 4 for "rope".
        value_residual: Whether each later block mixes its values with the first block's, v + l (v_first - v), where
            each block learns its l from 0.5 on. The first block's values are passed on, not recomputed, and gathered
            with the kept tokens; so no route may begin at the first block.
        patch_bottleneck_dim: Channels between two linear maps that embed a patch, as in JiT (128 for patches of 768
            values); None for one map, as in DiT.

    Raises:
        ValueError: An argument is out of range; routes as `resolve_routes`.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADTransformer2DModel
        >>> model = TREADTransformer2DModel.from_preset("S/2", sample_size=32, in_channels=4, num_classes=1000)
        >>> model(torch.randn(2, 4, 32, 32), torch.tensor([0.1, -0.5]), torch.tensor([207, 1000])).sample.shape
        torch.Size([2, 4, 32, 32])
    """

    # For dense forwards; routed ones are refused. The classes have no public name:
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/_modeling_parallel.py
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    _presets = {
        f"{family}{size}/{patch}": {
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "num_layers": num_layers,
            "patch_size": patch,
            **options,
        }
        for family, patches, options in (
            ("", (2, 4, 8), {}),
            ("LightningDiT-", (1,), LIGHTNING),
            ("JiT-", (16,), JIT),
        )
        for size, (dim, num_layers, heads) in PRESETS.items()
        for patch in patches
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
        norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
        qk_norm: Literal["rms_norm"] | None = None,
        ffn: Literal["gelu-approximate", "swiglu"] = "gelu-approximate",
        positions: Literal["sincos", "rope", "sincos+rope"] = "sincos",
        value_residual: bool = False,
        patch_bottleneck_dim: int | None = None,
    ):
        # Checks, routes and embeddings.
        super().__init__()
        _check_options(norm=norm, qk_norm=qk_norm, ffn=ffn, positions=positions)
        if "rope" in positions and attention_head_dim % 4:
            raise ValueError(f"Expected attention_head_dim divisible by 4 for rope, got {attention_head_dim}.")
        dim = num_attention_heads * attention_head_dim
        self._make_input(dim, positions="sincos" in positions)
        if value_residual and any(route.start == 0 for route in self.token_router.routes):
            raise ValueError(
                "Expected routes that begin after block 0, whose values of all tokens the value residual needs, got "
                f"{self.config.routes}. Use start=1 or value_residual=False."
            )

        # Blocks. The first has no other values to mix in, and so no share to learn.
        make_block = TREADValueResidualBlock if value_residual else TREADTransformerBlock
        # Only the class that this model uses: Accelerate's FSDP refuses a class that is not in the model.
        self._no_split_modules = self._repeated_blocks = [make_block.__name__]
        blocks = [
            make_block(
                dim,
                heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                attention_bias=attention_bias,
                norm_eps=norm_eps,
                ff_norm_eps=norm_eps if ff_norm_eps is None else ff_norm_eps,
                norm=norm,
                qk_norm=qk_norm,
                ffn=ffn,
            )
            for _ in range(num_layers)
        ]
        for block in blocks[1:] if value_residual else ():
            block.attn.first_value_share = nn.Parameter(torch.full((1,), 0.5))  # not a scalar, which FSDP refuses
        self.transformer_blocks = RoutedStack(blocks)
        self._make_output(dim, norm=make_norm(norm, dim, norm_eps))

        # With context parallelism each process rotates its share of the tokens.
        if "rope" in positions:
            self._cp_plan = self._cp_plan | {
                "transformer_blocks.*": {"rotary": ContextParallelInput(split_dim=1, expected_dims=3)}
            }

    def _block_arguments(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, height: int, width: int
    ) -> tuple[list[torch.Tensor | None], tuple[Any, ...]]:
        per_token: list[torch.Tensor | None] = []
        if "rope" in self.config.positions:
            base = self.config.sample_size // self.config.patch_size
            head_dim = self.config.attention_head_dim
            per_token = [rotary_positions(head_dim, height, width, base=base, device=tokens.device)]
        if self.config.value_residual:
            per_token = [*(per_token or [None]), None]  # the last stands for the first block's values
        return per_token, (conditioning,)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """diffusers' method, for LoRA and other adapters of PEFT.

        The linear layers of a block are called `to_qkv` (query, key and value), `to_out.0`, `ff.net.0.proj`,
        `ff.net.2` and `modulation`.

        Warns:
            UserWarning: The adapter reaches the attention's output but not query, key and value, because its targets
                name these as separate layers.
        """
        super().add_adapter(adapter_config, adapter_name)
        adapted = {name.split(f".{adapter_name}.")[0] for name in self.state_dict() if f".{adapter_name}." in name}
        if any(".to_out.0." in name for name in adapted) and not any(".to_qkv." in name for name in adapted):
            warnings.warn(
                "The adapter reaches 'to_out.0', but neither query, key nor value: they are one layer here, 'to_qkv'. "
                'Use target_modules=["to_qkv", "to_out.0"].',
                stacklevel=2,
            )


def _check_options(**options: str | None) -> None:
    for name, option in options.items():
        if option not in _OPTIONS[name]:
            raise ValueError(f"Expected {name} among {_OPTIONS[name]}, got {option!r}.")
