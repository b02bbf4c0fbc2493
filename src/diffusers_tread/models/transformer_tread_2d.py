# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The class-conditional diffusion transformer of DiT (arXiv 2212.09748) with token routes (TREAD, arXiv 2501.04765).

Shapes: B batch, C latent channels, H and W latent size, P patch size, N = (H / P) * (W / P) tokens, K kept tokens,
D width (heads * head dim).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ..routing import TokenRoute, TokenRouter, default_route, put_tokens, take_tokens
from .blocks import TREADTransformerBlock
from .positions import sincos_positions


# DiT, table 1:  width, blocks, heads. The patch size follows the slash: "XL/2".
_PRESETS = {
    "S":  ( 384,     12,     6),
    "B":  ( 768,     12,    12),
    "L":  (1024,     24,    16),
    "XL": (1152,     28,    16),
}  # fmt: skip


@dataclass
class TREADTransformer2DModelOutput(BaseOutput):
    """What a forward of `TREADTransformer2DModel` gives."""

    sample: torch.Tensor
    """[B, out_channels, H, W], in the dtype of the input."""

    kept_token_ids: list[torch.Tensor | None] | None = None
    """Per route the ids of the kept tokens, [B, K] int64, or None for a route not taken, for losses that tell kept
    tokens from routed ones. None for a dense forward."""

    prefix: torch.Tensor | None = None
    """[B, N, D], the tokens in front of the first route's first block, if `return_prefix` asked for them."""


class TREADTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
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
        objective: "edm", "flow" or "epsilon" (DDPM's noise prediction, as in DiT), what the weights were trained with;
            `TREADPipeline` refuses a scheduler of another kind. None: unknown, not checked.
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

    _supports_gradient_checkpointing = True
    _supports_prefix = True
    _no_split_modules = ["TREADTransformerBlock"]
    _repeated_blocks = ["TREADTransformerBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embedding",
        "timestep_embedding",
        "class_embedding",
        "norm",
        "^proj_out",
    ]

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
        routes: "Literal['default'] | Iterable[TokenRoute | Mapping[str, Any]] | None" = "default",
        timestep_scale: float = 1.0,
        objective: Literal["edm", "flow", "epsilon"] | None = None,
        mlp_ratio: float = 4.0,
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        ff_norm_eps: float | None = None,
        freq_shift: int = 0,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(
                f"Expected a width divisible by 4 for the 2D positions, got {num_attention_heads} heads x "
                f"{attention_head_dim} = {dim}."
            )
        if patch_size < 1 or sample_size < 1 or sample_size % patch_size:
            raise ValueError(f"Expected sample_size divisible by patch_size {patch_size}, got {sample_size}.")
        if num_classes < 0:
            raise ValueError(f"Expected num_classes >= 0 (0: unconditional), got {num_classes}.")
        if objective not in (None, "edm", "flow", "epsilon"):
            raise ValueError(f"Expected objective 'edm', 'flow', 'epsilon' or None, got {objective!r}.")
        if freq_shift not in (0, 1):
            raise ValueError(f"Expected freq_shift 0 or 1, got {freq_shift!r}.")

        # Routing.
        routes = default_route(num_layers) if routes == "default" else routes
        self.token_router = TokenRouter(routes, num_layers=num_layers)
        self.register_to_config(routes=[route.to_dict() for route in self.token_router.routes] or None)

        # Input: patches, positions, time and class.
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch_embedding = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.timestep_embedding = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        positions = sincos_positions(dim, sample_size // patch_size, sample_size // patch_size)
        self.register_buffer("positions", positions, persistent=False)  # N D

        # Blocks.
        self.transformer_blocks = nn.ModuleList(
            TREADTransformerBlock(
                dim,
                heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                attention_bias=attention_bias,
                norm_eps=norm_eps,
                ff_norm_eps=norm_eps if ff_norm_eps is None else ff_norm_eps,
            )
            for _ in range(num_layers)
        )

        # Output.
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self._init_weights()

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        routes: "Literal['default'] | Iterable[TokenRoute | Mapping[str, Any]] | None" = "default",
        timestep_scale: float = 1.0,
        objective: Literal["edm", "flow", "epsilon"] | None = None,
    ) -> "TREADTransformer2DModel":
        """A model of one of DiT's sizes: "S", "B", "L" or "XL" with patch size 2, 4 or 8, such as "XL/2".

        Parameters at patch 2, 4 channels, 1000 classes: S 33M, B 130M, L 458M, XL 675M.

        Raises:
            ValueError: Unknown preset; the others as the constructor.
        """
        known = [f"{size}/{patch}" for size in _PRESETS for patch in (2, 4, 8)]
        if preset not in known:
            raise ValueError(f"Expected a preset among {known}, got {preset!r}.")
        size, patch_size = preset.split("/")
        dim, num_layers, heads = _PRESETS[size]
        return cls(
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            num_layers=num_layers,
            in_channels=in_channels,
            sample_size=sample_size,
            patch_size=int(patch_size),
            num_classes=num_classes,
            routes=routes,
            timestep_scale=timestep_scale,
            objective=objective,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        kept_token_ids: list[torch.Tensor | None] | None = None,
        return_dict: bool = True,
        *,
        prefix: torch.Tensor | None = None,
        return_prefix: bool = False,
    ) -> "TREADTransformer2DModelOutput | tuple[Any, ...]":
        """Predicts what the objective asks for (EDM: the raw network F, flow: noise - data).

        Args:
            hidden_states: [B, C, H, W] latents, H and W divisible by the patch size.
            timestep: [B] or [], as the scheduler gives it (EDM: ln(sigma) / 4, flow: sigma * 1000).
            class_labels: [B] int64 in [0, num_classes]; None for the null class. Not checked here, which would make
                every step wait for the device: the pipeline and the training script check.
            kept_token_ids: Per route the ids of the kept tokens, [B, K] int64, or None for a route not taken, as
                `TokenRouter.plan` gives them. None: the token router decides.
            return_dict: Whether to return a `TREADTransformer2DModelOutput` or a tuple.
            prefix: [B, N, D], the tokens in front of the first route's first block, as another forward with the same
                `hidden_states`, `timestep` and `class_labels` gave them; the blocks before are not run then. They do
                not depend on what is routed away, so the branches of Sparse Guidance share them.
            return_prefix: Whether to give `prefix`.

        Returns:
            `sample`: [B, out_channels, H, W] in the dtype of `hidden_states`; `kept_token_ids`, those that were used,
            and `prefix`, which a tuple has only where they are not None.

        Raises:
            ValueError: Wrong number of channels, timesteps or labels, a size not divisible by the patch size,
                `kept_token_ids` that do not fit the routes and the batch, a `prefix` of another shape, or a prefix
                where there are no routes.
        """
        height, width = self._check_inputs(hidden_states, timestep, class_labels, kept_token_ids)
        self._check_prefix(prefix, return_prefix, (hidden_states.shape[0], height * width, self.positions.shape[1]))
        # Made contiguous once: the residual stream keeps its layout, and layer norms and products would copy it each.
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # B N D
        # Cast to the input's dtype: under autocast the residual stream stays in fp32.
        tokens = (tokens + self._positions_for(height, width)).to(hidden_states.dtype)
        conditioning = self._embed_conditioning(timestep, class_labels, hidden_states)  # B D

        if kept_token_ids is None:
            kept_token_ids = self.token_router.plan(tokens, training=self.training)

        tokens, prefix = self._run_blocks(tokens, conditioning, kept_token_ids, prefix, return_prefix)

        shift, scale = self.modulation_out(conditioning).unsqueeze(1).chunk(2, dim=-1)  # B 1 D
        patches = self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))  # B N P*P*C
        sample = self._unpatchify(patches, height, width).to(hidden_states.dtype)  # B C H W
        output = TREADTransformer2DModelOutput(
            sample=sample, kept_token_ids=kept_token_ids, prefix=prefix if return_prefix else None
        )
        return output if return_dict else output.to_tuple()

    def _run_blocks(
        self,
        tokens: torch.Tensor,
        conditioning: torch.Tensor,
        kept_token_ids: list[torch.Tensor | None] | None,
        prefix: torch.Tensor | None,
        return_prefix: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The blocks, with each route's kept tokens gathered before its first block and put back after its last.

        Gives the tokens after the last block, and the prefix if there is one or it is asked for.
        """
        starts, ends = {}, {}
        if kept_token_ids is not None:
            for route, ids in zip(self.token_router.routes, kept_token_ids, strict=True):
                if ids is not None:
                    starts[route.start] = route.rejoin, ids
                    ends[route.end] = ids

        input_tokens = tokens
        prefix_end = self.token_router.routes[0].start if prefix is not None or return_prefix else None
        for index, block in enumerate(self.transformer_blocks):
            if prefix is not None and index < prefix_end:
                continue
            if index == prefix_end:
                tokens = prefix = tokens if prefix is None else prefix
            if index in starts:
                rejoin, ids = starts[index]
                all_tokens = input_tokens if rejoin == "input" else tokens
                if rejoin == "sum":
                    all_tokens = input_tokens + tokens
                tokens = take_tokens(tokens, ids)  # B N D -> B K D
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning)
            else:
                tokens = block(tokens, conditioning)
            if index in ends:
                tokens = put_tokens(all_tokens, ends[index], tokens)  # B K D -> B N D
        return tokens, prefix

    def _embed_conditioning(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """[B, D]: SiLU of the sum of the time and class embeddings, which every block and the output use."""
        batch_size = hidden_states.shape[0]
        timestep = timestep.to(hidden_states.device, torch.float32).expand(batch_size) * self.config.timestep_scale
        frequencies = get_timestep_embedding(
            timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=self.config.freq_shift
        )  # B 256
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_classes, device=hidden_states.device)

        embedding = self.timestep_embedding(frequencies.to(hidden_states.dtype)) + self.class_embedding(class_labels)
        return F.silu(embedding).to(hidden_states.dtype)

    def _positions_for(self, height: int, width: int) -> torch.Tensor:
        """[N, D] for height x width tokens: the stored table or, for another size, one scaled to its range."""
        base = self.config.sample_size // self.config.patch_size
        if height == width == base:
            return self.positions
        return sincos_positions(self.positions.shape[1], height, width, base=base, device=self.positions.device)

    def _unpatchify(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, N, P*P*C] to [B, C, H, W], N = height * width tokens."""
        patch_size = self.config.patch_size
        grid = patches.unflatten(2, (patch_size, patch_size, self.out_channels)).unflatten(1, (height, width))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C h P w P -> B C H W

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        kept_token_ids: list[torch.Tensor | None] | None,
    ) -> tuple[int, int]:
        """Compares shapes, nothing that waits for the device; gives the grid's height and width in tokens."""
        patch_size, in_channels = self.config.patch_size, self.config.in_channels
        if hidden_states.dim() != 4 or hidden_states.shape[1] != in_channels:
            raise ValueError(f"Expected latents [B, {in_channels}, H, W], got {list(hidden_states.shape)}.")
        batch_size, _, height, width = hidden_states.shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"Expected height and width divisible by the patch size {patch_size}, got {height}x{width}."
            )
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"Expected one timestep or {batch_size}, got shape {list(timestep.shape)}.")
        if class_labels is not None and class_labels.shape != (batch_size,):
            raise ValueError(f"Expected {batch_size} class labels, got shape {list(class_labels.shape)}.")
        if kept_token_ids is not None:
            shapes = [None if ids is None else list(ids.shape) for ids in kept_token_ids]
            fits = [shape is None or (len(shape) == 2 and shape[0] == batch_size) for shape in shapes]
            if len(shapes) != len(self.token_router.routes) or not all(fits):
                raise ValueError(
                    f"Expected kept_token_ids of shape [{batch_size}, K], or None, for each of the "
                    f"{len(self.token_router.routes)} routes, got {shapes}."
                )
        return height // patch_size, width // patch_size

    def _check_prefix(self, prefix: torch.Tensor | None, return_prefix: bool, shape: tuple[int, int, int]) -> None:
        if (prefix is not None or return_prefix) and not self.token_router.routes:
            raise ValueError("Expected a model with routes for a prefix, got routes=None. Leave the prefix out.")
        if prefix is not None and prefix.shape != shape:
            raise ValueError(
                f"Expected a prefix {list(shape)}, as return_prefix=True gave it for these inputs, got "
                f"{list(prefix.shape)}."
            )

    def _init_weights(self) -> None:
        """DiT's initialisation (arXiv 2212.09748, section 3.2 and appendix A); the zeros come last."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for weight in module.weight.chunk(3 if name.endswith("to_qkv") else 1):
                    nn.init.xavier_uniform_(weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.linear_2.weight, std=0.02)

        # adaLN-Zero: every block is the identity, the output 0.
        for module in [block.modulation for block in self.transformer_blocks] + [self.modulation_out, self.proj_out]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
