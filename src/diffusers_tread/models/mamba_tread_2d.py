# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A class-conditional diffusion model of bidirectional Mamba-2 blocks with token routes.

The scan is Mamba-2's (SSD, arXiv 2405.21060), in both directions with one input projection (Hydra, arXiv 2407.09941).
adaLN-Zero modulates it as in DiT (arXiv 2212.09748), and the routes are TREAD's (arXiv 2501.04765).

Shapes: B batch, N tokens, K kept tokens, D width; in the scan L tokens in M chunks of Q, H heads of P channels, S
channels of state. Direction 0 is forward (a state of the tokens before), direction 1 backward (of the tokens after).
"""

import importlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from ..routing import RoutedStack, take_tokens
from ..typed_config import register_to_config
from .latent_denoiser import LatentDenoiser, Routes


# Width, blocks: DiT's width for the same letter, and twice its blocks, each with half the weights. Heads have 64
# channels.
# Parameters at patch 2, 4 channels, 1000 classes: S 36M, B 136M, L 474M.
MAMBA_PRESETS = {
    "S": ( 384, 24),
    "B": ( 768, 24),
    "L": (1024, 48),
}  # fmt: skip

_CHUNK_SIZE = 64
"""Measured on CPUs: as fast as 128 and half the memory."""

_LARGEST_SINGLE_CHUNK = 128
"""Up to this length one chunk, which needs no state, takes half the time of chunks of 64 (measured on CPUs)."""


# The scan.


def bidirectional_scan(
    x: torch.Tensor,
    time_step: torch.Tensor,
    log_decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Reads at each token the decayed states of the tokens before it and of those after it, without the token itself.

    With S_t = exp(log_decay_t) S_{t-1} + time_step_t x_t (x) b_t (arXiv 2405.21060, equations 1 and 2) the forward
    part is exp(log_decay_t) S_{t-1} c_t; the backward part is the same on the reversed sequence. These are the strict
    triangles of Hydra's quasiseparable matrix (arXiv 2407.09941, section 3), whose diagonal the caller adds.

    Computed in chunks (arXiv 2405.21060, section 6): within a chunk by a masked matrix product, for both directions at
    once because their triangles do not overlap; between chunks by the states that they leave behind.

    Args:
        x: [B, L, H, P].
        time_step: [B, L, 2, H], per direction, >= 0. Below 1e-30 it counts as 1e-30.
        log_decay: [B, L, 2, H], per direction, <= 0.
        b: [B, L, 2, S], per direction how a token is written to the state, for all heads.
        c: [B, L, 2, S], per direction how a token reads the state.
        chunk_size: Q; None for a fast one. It changes the result by rounding only.

    Returns:
        [B, L, H, P].
    """
    # Chunks.
    length, state_size = x.shape[1], b.shape[-1]
    if chunk_size is None:
        chunk_size = length if length <= _LARGEST_SINGLE_CHUNK else _CHUNK_SIZE
    log_time_step = time_step.clamp_min(1e-30).log()

    # Chunks come first, and heads before tokens, so that all products are of contiguous matrices.
    x = _in_chunks(x, chunk_size).permute(1, 0, 3, 2, 4).contiguous()  # M B H Q P
    b, c = (_in_chunks(one, chunk_size).permute(1, 0, 3, 2, 4) for one in (b, c))  # M B 2 Q S
    log_decay, log_time_step = (
        _in_chunks(one, chunk_size).permute(3, 1, 0, 4, 2).contiguous() for one in (log_decay, log_time_step)
    )  # 2 M B H Q

    # Within chunks. Log decays are summed from the chunk's start: `ahead` includes the token itself, `behind` doesn't.
    sums = log_decay.cumsum(dim=-1)
    ahead, behind = sums[0], F.pad(sums[1, ..., :-1], (1, 0))  # M B H Q
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril(-1)
    log_weights = torch.where(
        lower,
        ahead.unsqueeze(-1) - (ahead - log_time_step[0]).unsqueeze(-2),
        (behind + log_time_step[1]).unsqueeze(-2) - behind.unsqueeze(-1),
    )  # M B H Q Q, each triangle <= log_time_step
    scores = c @ b.transpose(-1, -2)  # M B 2 Q Q
    scores = scores[:, :, 0].tril(-1) + scores[:, :, 1].triu(1)  # M B Q Q
    weights = log_weights.exp() * scores.unsqueeze(2)  # M B H Q Q
    y = weights @ x  # M B H Q P

    # Between chunks: the state that each writes, the state that arrives in each, and its tokens reading it.
    if x.shape[0] > 1:
        totals = sums[..., -1]  # 2 M B H
        leaving = torch.stack([totals[0].unsqueeze(-1) - ahead, behind], dim=-1) + log_time_step.movedim(0, -1)
        arriving = torch.stack([ahead, totals[1].unsqueeze(-1) - behind], dim=-1)  # M B H Q 2
        states = _weigh(b, leaving).transpose(-1, -2) @ x  # M B H 2S P
        states = _pass_on(states.unflatten(3, (2, state_size)), totals).flatten(3, 4)
        y = torch.baddbmm(y.flatten(0, 2), _weigh(c, arriving).flatten(0, 2), states.flatten(0, 2)).view_as(y)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]  # B L H P


def _in_chunks(sequence: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """[B, L, ...] to [B, M, Q, ...], padded with zeros, which write nothing, do not decay, and so change nothing."""
    padding = -sequence.shape[1] % chunk_size
    if padding:
        sequence = F.pad(sequence, (0, 0) * (sequence.dim() - 2) + (0, padding))
    return sequence.unflatten(1, (-1, chunk_size))


def _weigh(vectors: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """[M, B, 2, Q, S] times exp([M, B, H, Q, 2]): [M, B, H, Q, 2S], both directions in one state."""
    return (log_weights.exp().unsqueeze(-1) * vectors.transpose(2, 3).unsqueeze(2)).flatten(-2)


def _pass_on(states: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """The state that arrives in each chunk: those left by the chunks before it, or after it, decayed on the way.

    Args:
        states: [M, B, H, 2, S, P], per direction the state that each chunk writes.
        totals: [2, M, B, H], the log decay of each chunk.

    Returns:
        The shape of `states`.
    """
    # Log decays from chunk to chunk.
    num_chunks = states.shape[0]
    after = totals.cumsum(dim=1).movedim(1, -1)  # 2 B H M, log decay from the first chunk, with the chunk itself
    before = F.pad(after[..., :-1], (1, 0))  # without it
    log_decays = torch.stack(
        [
            before[0].unsqueeze(-1) - after[0].unsqueeze(-2),  # to chunk i from j < i
            before[1].unsqueeze(-2) - after[1].unsqueeze(-1),  # from j > i
        ],
        dim=2,
    )  # B H 2 M M

    # Sums of decayed states. Masked before the exponential, which would be infinite on the other side.
    lower = torch.ones(num_chunks, num_chunks, dtype=torch.bool, device=states.device).tril(-1)
    decays = log_decays.masked_fill(~torch.stack([lower, lower.T]), -torch.inf).exp().flatten(0, 2)  # BH2 M M
    arriving = decays @ states.flatten(4).flatten(1, 3).transpose(0, 1)  # BH2 M SP
    return arriving.transpose(0, 1).reshape(states.shape)


@cache
def _find_kernel() -> Callable[..., torch.Tensor] | None:
    """The scan of the package `mamba-ssm`, or None where it cannot be imported."""
    # An import statement would make diffusers demand the package from everyone who loads the model from the Hub.
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError:
        return None


def _scan_by_kernel(
    kernel: Callable[..., torch.Tensor],
    x: torch.Tensor,
    time_step: torch.Tensor,
    decay_rate: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    """As `bidirectional_scan` with log_decay = time_step * decay_rate [H]: both directions in one batch."""
    x = torch.cat([x, x.flip(1)])  # 2B L H P
    time_step, b, c = (torch.cat([one[:, :, 0], one[:, :, 1].flip(1)]) for one in (time_step, b, c))
    y = kernel(x, time_step, decay_rate, b.unsqueeze(2), c.unsqueeze(2), chunk_size=256)
    # The kernel's states include the token itself, which is subtracted.
    own = (b * c).sum(dim=-1, keepdim=True) * time_step  # 2B L H
    forward, backward = (y - own.unsqueeze(-1) * x).chunk(2)
    return forward + backward.flip(1)


# The model.


class TREADMamba2Mixer(nn.Module):
    """Mamba-2's mixer (arXiv 2405.21060, section 7) with a scan in both directions and one group.

    The convolution is symmetric instead of causal. The norm comes before the gate.
    """

    def __init__(self, dim: int, *, expand: int, head_dim: int, state_size: int, conv_kernel: int, norm_eps: float):
        super().__init__()
        inner_dim = expand * dim
        num_heads = inner_dim // head_dim
        self.head_dim, self.state_size = head_dim, state_size
        self.splits = [inner_dim, inner_dim + 4 * state_size, 2 * num_heads]
        """Channels of the gate; of x with b and c of both directions; of the time steps of both directions."""

        # Layers.
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        # A 2D convolution over [B, channels, 1, L] in channels-last layout is three times as fast as a 1D one on CPUs.
        channels = self.splits[1]
        self.conv = nn.Conv2d(
            channels, channels, kernel_size=(1, conv_kernel), padding=(0, conv_kernel // 2), groups=channels
        )
        self.norm = nn.RMSNorm(inner_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

        # As in Mamba-2: decay rates in [1, 16], time steps log-uniform in [1e-3, 0.1] through the inverse of softplus.
        time_step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(time_step + torch.log(-torch.expm1(-time_step)))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, D] in scan order to [B, L, D]."""
        gate, mixed, time_step = self.in_proj(hidden_states).split(self.splits, dim=-1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2).unsqueeze(2))).squeeze(2).transpose(1, 2)  # B L channels
        y = self._scan(mixed, time_step).to(self.norm.weight.dtype)  # B L inner
        return self.out_proj(self.norm(y) * F.silu(gate))

    def _scan(self, mixed: torch.Tensor, time_step: torch.Tensor) -> torch.Tensor:
        """x, b, c and raw time steps to [B, L, inner], in float32, also under autocast."""
        dtype = torch.promote_types(mixed.dtype, torch.float32)
        x, b, c = mixed.to(dtype).split([self.splits[0], 2 * self.state_size, 2 * self.state_size], dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))  # B L H P
        b, c, time_step = (one.unflatten(-1, (2, -1)) for one in (b, c, time_step))  # B L 2 S, B L 2 H
        time_step = F.softplus(time_step.to(dtype) + self.dt_bias.to(dtype))
        decay_rate = -self.A_log.to(dtype).exp()  # H

        # Autocast does not know the meta device.
        device = x.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            kernel = _find_kernel() if device == "cuda" and not torch.compiler.is_compiling() else None
            if kernel is not None:
                y = _scan_by_kernel(kernel, x, time_step, decay_rate, b, c)
            else:
                y = bidirectional_scan(x, time_step, time_step * decay_rate, b, c)
        return torch.addcmul(y, self.D.to(dtype).unsqueeze(-1), x).flatten(2)


class TREADMamba2DBlock(nn.Module):
    """A mixer with adaLN-Zero (arXiv 2212.09748, figure 3) and without a feed-forward layer.

    Args:
        scan_order: "rows", which is the raster order of the tokens, or "columns".
    """

    def __init__(self, dim: int, *, scan_order: str, norm_eps: float, **mixer: Any):
        super().__init__()
        self.scan_order = scan_order
        self.norm = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.mixer = TREADMamba2Mixer(dim, norm_eps=norm_eps, **mixer)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, column_ranks: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [B, N, D] in raster order, or the kept tokens [B, K, D].
            conditioning: [B, D], SiLU of the embedded time and class.
            column_ranks: [B or 1, N] or [B, K] int64, the tokens' ranks when columns are read one after the other.

        Returns:
            The shape of `hidden_states`.
        """
        shift, scale, gate = self.modulation(conditioning).unsqueeze(1).chunk(3, dim=-1)  # B 1 D
        mixer_input = torch.addcmul(shift, self.norm(hidden_states), 1 + scale)
        if self.scan_order == "columns":
            order = column_ranks.argsort(dim=1)
            batch_size = hidden_states.shape[0]
            output = self.mixer(take_tokens(mixer_input, order.expand(batch_size, -1)))
            output = take_tokens(output, order.argsort(dim=1).expand(batch_size, -1))
        else:
            output = self.mixer(mixer_input)
        return torch.addcmul(hidden_states, gate, output)


# What diffusers' caches and layer skipping need to know of a block; see transformer_tread_2d.py.
TransformerBlockRegistry._registry[TREADMamba2DBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, _cls=TREADMamba2DBlock
)


class TREADMamba2DModel(LatentDenoiser):
    r"""Bidirectional Mamba-2 blocks, of which the middle ones can be skipped by a random share of the rows of tokens.

    Every other block scans the columns of the grid instead of its rows. In training mode the tokens take the routes;
    in evaluation mode the model is dense, unless `token_routing` sets a ratio. At initialisation the output is
    exactly 0.

    Args:
        hidden_size: Width D, divisible by 4.
        num_layers: Number of blocks.
        in_channels: Channels C of the latents (4 for the SD VAE, 16 for Flux's, 1 or 3 for pixels).
        out_channels: Channels of the prediction; None for `in_channels`.
        sample_size: Height and width of the training latents. Any other size divisible by `patch_size` works too; its
            positions are scaled to the same range.
        patch_size: P, side of a token in latent pixels.
        num_classes: Number of classes. Index `num_classes` is the null class of classifier-free guidance; 0 makes an
            unconditional model.
        routes: The token routes: "default" for half of the rows from block 2 to block num_layers - 4, a list of
            `TokenRoute` or of their mappings, None for a model without routing. Stored in the config as mappings with
            absolute indices.
        timestep_scale: Factor on the timestep before the sinusoidal embedding, see `TREADTransformer2DModel`.
        objective: What the weights are trained for, a name of `diffusers_tread.objectives`.
        expand: Width of the scan divided by D.
        head_dim: Channels of a head of the scan; divides expand * D.
        state_size: Channels of state for each channel of a head.
        conv_kernel: Number of tokens under the convolution, odd.
        norm_eps: Epsilon of the norms.
        freq_shift: The timestep's frequencies are 10000^(-i / (128 - freq_shift)), 0 or 1.
        patch_bottleneck_dim: As in `TREADTransformer2DModel`.

    Raises:
        ValueError: An argument is out of range; routes as `resolve_routes`.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADMamba2DModel
        >>> model = TREADMamba2DModel.from_preset("Mamba-S/2", sample_size=32, in_channels=4, num_classes=1000)
        >>> model(torch.randn(1, 4, 32, 32), torch.tensor([0.1]), torch.tensor([207])).sample.shape
        torch.Size([1, 4, 32, 32])
    """

    _presets = {
        f"Mamba-{size}/{patch}": {"hidden_size": dim, "num_layers": num_layers, "patch_size": patch}
        for size, (dim, num_layers) in MAMBA_PRESETS.items()
        for patch in (2, 4, 8)
    }
    _route_unit = "row"
    _no_split_modules = ["TREADMamba2DBlock"]
    _repeated_blocks = ["TREADMamba2DBlock"]
    _keep_in_fp32_modules = ["A_log", "D", "dt_bias"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 384,
        num_layers: int = 24,
        in_channels: int = 4,
        out_channels: int | None = None,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        routes: Routes = "default",
        timestep_scale: float = 1.0,
        objective: str = "edm",
        expand: int = 2,
        head_dim: int = 64,
        state_size: int = 64,
        conv_kernel: int = 3,
        norm_eps: float = 1e-6,
        freq_shift: int = 0,
        patch_bottleneck_dim: int | None = None,
    ):
        # Checks.
        super().__init__()
        for name in ("expand", "head_dim", "state_size", "conv_kernel"):
            if not isinstance(value := self.config[name], int) or value < 1:
                raise ValueError(f"Expected {name} to be an int >= 1, got {value!r}.")
        if expand * hidden_size % head_dim:
            raise ValueError(
                f"Expected head_dim to divide expand * hidden_size = {expand * hidden_size}, got {head_dim}."
            )
        if conv_kernel % 2 == 0:
            raise ValueError(f"Expected an odd conv_kernel, which is symmetric about a token, got {conv_kernel}.")

        # Layers.
        self._make_input(hidden_size)
        blocks = [
            TREADMamba2DBlock(
                hidden_size,
                scan_order=("rows", "columns")[index % 2],
                norm_eps=norm_eps,
                expand=expand,
                head_dim=head_dim,
                state_size=state_size,
                conv_kernel=conv_kernel,
            )
            for index in range(num_layers)
        ]
        self.transformer_blocks = RoutedStack(blocks)
        self._make_output(hidden_size)

    def _block_arguments(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, height: int, width: int
    ) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
        column_ranks = torch.arange(height * width, device=tokens.device).view(width, height).T  # h w
        return [column_ranks.reshape(1, -1)], (conditioning,)
