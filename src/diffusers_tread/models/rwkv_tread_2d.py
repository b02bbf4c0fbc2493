# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A class-conditional diffusion model of RWKV blocks (Vision-RWKV, arXiv 2403.02308) with token routes (TREAD).

Shapes: B batch, h x w token grid, N tokens (h * w, or those of the kept rows), D width, C tokens per chunk,
n = N / C chunks.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from ..routing import RoutedStack
from ..typed_config import register_to_config
from .latent_denoiser import LatentDenoiser, Routes


# Vision-RWKV's S and B: width, blocks. Parameters at patch 2, 4 channels, 1000 classes: S 35M, B 137M.
RWKV_PRESETS = {
    "RWKV-S":  (384,     12),
    "RWKV-B":  (768,     12),
}  # fmt: skip


def bidirectional_wkv(
    key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, bonus: torch.Tensor, *, chunk_size: int = 32
) -> torch.Tensor:
    """Vision-RWKV's average of all values, weighted by keys and distances (arXiv 2403.02308, equations 4-6).

    out_t = sum_i a_ti v_i / sum_i a_ti with a_ti = exp(k_i - decay * (|t - i| - 1) / N) for i != t and
    a_tt = exp(k_t + bonus), for each channel. The decay is divided by the number of tokens, so it adapts to a shorter
    sequence: with half the tokens, the farthest two decay as much as before.

    Tokens inside a chunk are summed by one matrix per channel, and chunks interact through their sums: N * C + n^2
    products per channel, nearly linear in N up to a few thousand tokens. Weights are relative to the largest exponent
    that reaches a chunk. So float32 is enough for keys of any size while a chunk decays by at most exp(-60) (decay <=
    480 at 256 tokens), and for any decay while the keys of a channel differ by at most 60. Beyond both limits weights
    may vanish, and where all do the average is 0. Computed in at least float32, also under autocast; TF32, if allowed,
    rounds the sums.

    Args:
        key: [B, N, D].
        value: [B, N, D].
        decay: [D], >= 0.
        bonus: [D], added to a token's own key; a few units.
        chunk_size: C, which affects only the cost. On CPUs 32 was best for 256 and for 1,024 tokens.

    Returns:
        [B, N, D] in the dtype of `value`.
    """
    # Dtypes and sizes.
    value_dtype, dtype = value.dtype, torch.promote_types(value.dtype, torch.float32)
    batch_size, num_tokens, _ = key.shape
    chunk_size = min(chunk_size, num_tokens)
    padding = -num_tokens % chunk_size

    device = key.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        # Chunks. Channels come first, so that sums over a chunk are products with one matrix per channel.
        key, value = (tensor.to(dtype).flatten(0, 1).t().contiguous() for tensor in (key, value))  # D B*N
        key, value = (tensor.unflatten(1, (batch_size, num_tokens)) for tensor in (key, value))  # D B N
        if padding:
            key, value = F.pad(key, (0, padding), value=-torch.inf), F.pad(value, (0, padding))
        key, value = (tensor.unflatten(2, (-1, chunk_size)) for tensor in (key, value))  # D B n C

        # Weighted sums, with weights relative to the chunk's largest.
        decay = decay.to(dtype) / num_tokens
        largest = key.detach().amax(dim=-1, keepdim=True)  # D B n 1, it cancels
        weight = torch.exp(key - largest)  # D B n C
        sums = _sum_over_tokens(
            torch.stack([weight * value, weight], dim=1),  # D 2 B n C
            *_decay_inside_chunk(decay, bonus.to(dtype), chunk_size),
            *_decay_between_chunks(largest, decay, chunk_size),
        )

        # Their quotient.
        numerator, denominator = sums.unbind(1)
        out = (numerator / (denominator + 1e-35)).flatten(2)[:, :, :num_tokens]  # D B N
        return out.flatten(1).t().unflatten(0, (batch_size, num_tokens)).to(value_dtype)


def _decay_inside_chunk(
    decay: torch.Tensor, bonus: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[D, C, C] decays between the tokens of a chunk, and [D, C, 2] to the first token after and last before it."""
    tokens = torch.arange(chunk_size, device=decay.device)
    skipped = (tokens.unsqueeze(1) - tokens).abs() - 1  # C C, -1 for the token itself
    decay = decay.view(-1, 1, 1)
    inside = torch.where(skipped < 0, bonus.view(-1, 1, 1), -decay * skipped.clamp_min(0))
    outside = -decay * torch.stack([tokens.flip(0), tokens], dim=1)
    return torch.exp(inside), torch.exp(outside)


def _decay_between_chunks(
    largest: torch.Tensor, decay: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors that rescale sums from a chunk's largest key to the largest exponent that reaches the receiving chunk.

    Args:
        largest: [D, B, n, 1].
        decay: [D], per token.
        chunk_size: C.

    Returns:
        [D, B, n, 1] for a chunk's own sums, and [D, B, n, n] to each chunk for the sums of each, including the decay
        over the chunks in between. At most 1.
    """
    chunks = torch.arange(largest.shape[2], device=decay.device)
    skipped = ((chunks.unsqueeze(1) - chunks).abs() - 1).clamp_min(0) * chunk_size  # n n, tokens in between
    exponent = largest.mT - (decay.view(-1, 1, 1) * skipped).unsqueeze(1)  # D B n n
    reaching = exponent.detach().amax(dim=-1, keepdim=True)  # D B n 1, it cancels
    return torch.exp(largest - reaching), torch.exp(exponent - reaching)


def _sum_over_tokens(
    weighted: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor, own: torch.Tensor, between: torch.Tensor
) -> torch.Tensor:
    """[D, 2, B, n, C] to the same shape: the sums at each token over its own chunk, those before and those after."""
    chunks = weighted.flatten(1, 3)  # D 2*B*n C
    sums = (chunks @ outside).view(*weighted.shape[:4], 2).movedim(1, 3)  # D B n 2 2
    before, after = between.tril(-1) @ sums[..., 0], between.triu(1) @ sums[..., 1]  # D B n 2
    others = torch.stack([before, after], dim=-1).movedim(3, 1).flatten(1, 3)  # D 2*B*n 2
    others = (others @ outside.flip(2).mT).view_as(weighted)
    return torch.addcmul(others, (chunks @ inside).view_as(weighted), own.unsqueeze(1))


def q_shift(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Takes each quarter of the channels from one neighbour: above, below, left, right; 0 beyond the border.

    Vision-RWKV's shift by one token in four directions (arXiv 2403.02308, section 3.2).

    Args:
        tokens: [B, N, D], rows of `width` tokens in raster order; D divisible by 4.
        width: Columns of the grid.

    Raises:
        ValueError: The tokens are not whole rows.
    """
    if tokens.shape[1] % width:
        raise ValueError(
            f"Expected whole rows of {width} tokens, got {tokens.shape[1]} tokens. Keep rows: TokenRoute(unit='row')."
        )
    above, below, left, right = tokens.unflatten(1, (-1, width)).chunk(4, dim=-1)  # B h w D/4
    shifted = [
        F.pad(above[:, :-1], (0, 0, 0, 0, 1, 0)),
        F.pad(below[:, 1:], (0, 0, 0, 0, 0, 1)),
        F.pad(left[:, :, :-1], (0, 0, 1, 0)),
        F.pad(right[:, :, 1:], (0, 0, 0, 1)),
    ]
    return torch.cat(shifted, dim=-1).flatten(1, 2)


class TREADRWKVSpatialMix(nn.Module):
    """RWKV's replacement of attention: each channel averages over all tokens (arXiv 2403.02308, section 3.2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        # Share of the neighbours in the inputs of receptance, key and value: 1 - mu in the papers.
        self.shift = nn.Parameter(torch.full((3, dim), 0.5))
        # Over the grid channels decay by exp(-1), seeing all of the image, to exp(-64), seeing a few tokens.
        self.log_decay = nn.Parameter(torch.linspace(0, math.log(64), dim))
        self.bonus = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_states: torch.Tensor, width: int) -> torch.Tensor:
        neighbours = q_shift(hidden_states, width) - hidden_states
        for_receptance, for_key, for_value = (torch.addcmul(hidden_states, neighbours, share) for share in self.shift)
        key, value = self.key(for_key), self.value(for_value)
        average = bidirectional_wkv(key, value, self.log_decay.float().exp(), self.bonus)
        return self.output(torch.sigmoid(self.receptance(for_receptance)) * average)


class TREADRWKVChannelMix(nn.Module):
    """RWKV's feed-forward layer, with squared ReLU and a gate (arXiv 2403.02308, section 3.2)."""

    def __init__(self, dim: int, *, mlp_ratio: float):
        super().__init__()
        hidden_dim = int(dim * mlp_ratio + 1e-6)
        if hidden_dim < 1:
            raise ValueError(f"Expected an mlp_ratio that leaves at least one hidden channel, got {mlp_ratio}.")
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)
        self.shift = nn.Parameter(torch.full((2, dim), 0.5))

    def forward(self, hidden_states: torch.Tensor, width: int) -> torch.Tensor:
        neighbours = q_shift(hidden_states, width) - hidden_states
        for_receptance, for_key = (torch.addcmul(hidden_states, neighbours, share) for share in self.shift)
        value = self.value(F.relu(self.key(for_key)).square())
        return torch.sigmoid(self.receptance(for_receptance)) * value


class TREADRWKV2DBlock(nn.Module):
    """Spatial mix and channel mix with adaLN-Zero (arXiv 2212.09748, figure 3)."""

    def __init__(self, dim: int, *, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.spatial_mix = TREADRWKVSpatialMix(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.channel_mix = TREADRWKVChannelMix(dim, mlp_ratio=mlp_ratio)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, width: int) -> torch.Tensor:
        """
        Args:
            hidden_states: [B, N, D], all rows of the grid or the kept ones.
            conditioning: [B, D], SiLU of the embedded time and class.
            width: Columns of the grid.

        Returns:
            The shape of `hidden_states`.

        Raises:
            ValueError: The tokens are not whole rows.
        """
        modulation = self.modulation(conditioning).unsqueeze(1)  # B 1 6D
        shift_spatial, scale_spatial, gate_spatial, shift_channel, scale_channel, gate_channel = modulation.chunk(
            6, dim=-1
        )

        spatial_input = torch.addcmul(shift_spatial, self.norm1(hidden_states), 1 + scale_spatial)
        hidden_states = torch.addcmul(hidden_states, gate_spatial, self.spatial_mix(spatial_input, width))

        channel_input = torch.addcmul(shift_channel, self.norm2(hidden_states), 1 + scale_channel)
        return torch.addcmul(hidden_states, gate_channel, self.channel_mix(channel_input, width))


# What diffusers' caches and layer skipping need to know of a block; see transformer_tread_2d.py.
TransformerBlockRegistry._registry[TREADRWKV2DBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, _cls=TREADRWKV2DBlock
)


class TREADRWKV2DModel(LatentDenoiser):
    r"""A denoiser of RWKV blocks, without attention, whose middle blocks can be skipped by rows of tokens.

    Blocks as in Vision-RWKV (arXiv 2403.02308), applied to diffusion as in Diffusion-RWKV (arXiv 2404.04478), with
    DiT's conditioning, positions and output. There are no skips between blocks, which would pair kept tokens with all
    tokens. The shift to neighbours needs a grid, so routes keep whole rows; the neighbour is then the next kept row.
    In training mode the tokens take the routes; in evaluation mode the model is dense, unless `token_routing` sets a
    ratio. At initialisation the output is exactly 0.

    TREAD's RWKV result (210M parameters) has no published settings; the sizes and the route here may differ from it.

    Args:
        hidden_size: Width D, divisible by 4.
        num_layers: Number of blocks.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction; None for `in_channels`.
        sample_size: Height and width of the training latents. Any other size divisible by `patch_size` works too.
        patch_size: Side of a token in latent pixels.
        num_classes: Number of classes. Index `num_classes` is the null class of classifier-free guidance; 0 makes an
            unconditional model.
        routes: The token routes, all of unit "row": "default" for `default_route(num_layers, "row")`, a list of
            `TokenRoute` or of their mappings, None for a model without routing.
        timestep_scale: Factor on the timestep before the sinusoidal embedding.
        objective: What the weights are trained for, a name of `diffusers_tread.objectives`.
        mlp_ratio: Width of the channel mix divided by D.
        norm_eps: Epsilon of the layer norms.
        freq_shift: The timestep's frequencies are 10000^(-i / (128 - freq_shift)).
        patch_bottleneck_dim: As in `TREADTransformer2DModel`.

    Raises:
        ValueError: An argument is out of range; a route has another unit; else as `resolve_routes`. In a forward, the
            number of kept tokens is not a multiple of the width; whether they really form rows is not checked.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADRWKV2DModel
        >>> model = TREADRWKV2DModel.from_preset("RWKV-S/2", sample_size=32, in_channels=4, num_classes=1000)
        >>> model(torch.randn(2, 4, 32, 32), torch.tensor([0.1, -0.5]), torch.tensor([207, 1000])).sample.shape
        torch.Size([2, 4, 32, 32])
    """

    _presets = {
        f"{size}/{patch}": {"hidden_size": dim, "num_layers": num_layers, "patch_size": patch}
        for size, (dim, num_layers) in RWKV_PRESETS.items()
        for patch in (2, 4, 8)
    }
    _route_unit = "row"
    _no_split_modules = ["TREADRWKV2DBlock"]
    _repeated_blocks = ["TREADRWKV2DBlock"]
    _keep_in_fp32_modules = ["log_decay", "bonus"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 384,
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
        norm_eps: float = 1e-6,
        freq_shift: int = 0,
        patch_bottleneck_dim: int | None = None,
    ):
        super().__init__()
        self._make_input(hidden_size)
        if units := {route.unit for route in self.token_router.routes} - {"row"}:
            raise ValueError(
                f"Expected routes of unit 'row', whose kept tokens have neighbours on a grid, got {sorted(units)}. "
                "Use TokenRoute(..., unit='row')."
            )
        blocks = [TREADRWKV2DBlock(hidden_size, mlp_ratio=mlp_ratio, norm_eps=norm_eps) for _ in range(num_layers)]
        self.transformer_blocks = RoutedStack(blocks)
        self._make_output(hidden_size)

    def _block_arguments(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, height: int, width: int
    ) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
        return [], (conditioning, width)
