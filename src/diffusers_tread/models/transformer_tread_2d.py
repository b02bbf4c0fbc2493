# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The class-conditional diffusion transformer of DiT (arXiv 2212.09748) with token routes (TREAD, arXiv 2501.04765).

Shapes: B batch, C latent channels, H and W latent size, P patch size, N = (H / P) * (W / P) tokens, K kept tokens,
D width (heads * head dim).
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    get_1d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_utils import ModelMixin

from ..routing import RoutedStack, RoutingCall, TokenRoute, TokenRouter, check_can_route, default_route, hook_names
from .modeling_outputs import DenoiserOutput


# DiT, table 1:  width, blocks, heads. The patch size follows the slash: "XL/2".
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


def sincos_positions(
    dim: int, height: int, width: int, *, base: int, device: "torch.device | str | None" = None
) -> torch.Tensor:
    """Fixed 2D sine-cosine position embeddings (arXiv 2111.06377), computed in float64 and rounded.

    The scaled rows and columns themselves are float32, as in diffusers, whose bits these are: exact for the training
    grid and its power-of-two multiples, else off by a rounding.

    Args:
        dim: D, divisible by 4.
        height: Rows of tokens.
        width: Columns of tokens.
        base: Rows and columns are scaled to [0, base), the range of the training grid.
        device: Where to make them.

    Returns:
        [height * width, D] float32, tokens in row-major order; the first half of the channels is for the column.
    """
    # Not by diffusers' function for two dimensions, which makes a graph for square and one for other images.
    rows, columns = (
        get_1d_sincos_pos_embed_from_grid(
            dim // 2, torch.arange(size, device=device, dtype=torch.float32) / (size / base), output_type="pt"
        )
        for size in (height, width)
    )  # h D/2, w D/2
    rows, columns = rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1)  # h w D/2
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


# What diffusers' caches, layer skipping and perturbed attention ask of a block. The tables have no public name, and
# their `register` first imports all of diffusers' transformers:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/hooks/_helpers.py
TransformerBlockRegistry._registry[TREADTransformerBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, _cls=TREADTransformerBlock
)
AttentionProcessorRegistry._registry[TREADAttnProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=lambda attn, hidden_states: hidden_states
)


class TREADTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
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

    _supports_gradient_checkpointing = True
    _supports_prefix = True
    # Of a dense forward; a routed one is refused. The classes have no public name:
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/_modeling_parallel.py
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
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
        objective: str = "edm",
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
        base = sample_size // patch_size
        self.register_buffer("positions", sincos_positions(dim, base, base, base=base), persistent=False)  # N D

        # Blocks.
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

        # Output.
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self._init_weights()

    @classmethod
    def presets(cls) -> list[str]:
        """The names of DiT's sizes that `from_preset` knows."""
        return [f"{size}/{patch}" for size in PRESETS for patch in (2, 4, 8)]

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
        objective: str = "edm",
    ) -> "TREADTransformer2DModel":
        """A model of one of DiT's sizes: "S", "B", "L" or "XL" with patch size 2, 4 or 8, such as "XL/2".

        Parameters at patch 2, 4 channels, 1000 classes: S 33M, B 130M, L 458M, XL 675M.

        Raises:
            ValueError: Unknown preset; the others as the constructor.
        """
        if preset not in cls.presets():
            raise ValueError(f"Expected a preset among {cls.presets()}, got {preset!r}.")
        size, patch_size = preset.split("/")
        dim, num_layers, heads = PRESETS[size]
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
        timestep: "torch.Tensor | float",
        class_labels: torch.Tensor | None = None,
        kept_token_ids: list[torch.Tensor | None] | None = None,
        return_dict: bool = True,
        *,
        routing: RoutingCall | None = None,
        prefix: torch.Tensor | None = None,
        return_prefix: bool = False,
        hidden_states_at: Iterable[int] = (),
    ) -> "DenoiserOutput | tuple[Any, ...]":
        """Predicts what the objective asks for (EDM: the raw network F, flow: noise - data).

        Args:
            hidden_states: [B, C, H, W] latents, H and W divisible by the patch size.
            timestep: [B] or one for all, as the scheduler gives it (EDM: ln(sigma) / 4, flow: sigma * 1000). Give
                a compiled forward a tensor: each value of a Python float makes another graph.
            class_labels: [B] int64 in [0, num_classes]; None for the null class. Not checked here, which would make
                every step wait for the device: the pipeline and the training script check.
            kept_token_ids: Per route the ids of the kept tokens, [B, K] int64 in [0, N), each at most once, or None
                for a route not taken, as `TokenRouter.plan` gives them. None: the token router decides.
            return_dict: Whether to return a `DenoiserOutput` or a tuple.
            routing: How this forward routes; what it leaves open, `token_routing` and the router's defaults decide.
            prefix: [B, N, D], the tokens in front of the first route's first block, as another forward with the same
                `hidden_states`, `timestep` and `class_labels` gave them; the blocks before are not run then. They do
                not depend on what is routed away, so the branches of Sparse Guidance share them.
            return_prefix: Whether to give `prefix`.
            hidden_states_at: Indices of blocks, 0-based, after which to give the tokens, for losses on them.

        Returns:
            `sample`: [B, out_channels, H, W] in the dtype of `hidden_states`; `kept_token_ids`, those that were used,
            `prefix` and `hidden_states`, which a tuple has only where they are not None.

        Raises:
            ValueError: Wrong number of channels, timesteps or labels, a size not divisible by the patch size, both
                `kept_token_ids` and `routing`, a routed forward with a cache or context parallelism; else as
                `RoutedStack.forward`.
        """
        height, width = self._check_inputs(hidden_states, class_labels, kept_token_ids, routing)
        # Made contiguous once: the residual stream keeps its layout, and layer norms and products would copy it each.
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # B N D
        # In the input's dtype, whichever way the weights came to theirs: under autocast the residual stream stays in
        # fp32, and bfloat16 positions are the same after `to` and after `from_pretrained`.
        positions = self._positions_for(height, width).to(hidden_states.dtype)  # N D
        tokens = (tokens + positions).to(hidden_states.dtype)
        conditioning = self._embed_conditioning(timestep, class_labels, hidden_states)  # B D

        # Blocks.
        if kept_token_ids is None:
            grid_size = (height, width)
            kept_token_ids = self.token_router.plan(tokens, training=self.training, call=routing, grid_size=grid_size)
        if kept_token_ids is not None:
            check_can_route(self)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        tokens, prefix, hidden_states_after = self.transformer_blocks(
            tokens,
            conditioning,
            routes=self.token_router.routes,
            kept_token_ids=kept_token_ids,
            prefix=prefix,
            return_prefix=return_prefix,
            hidden_states_at=hidden_states_at,
            checkpoint=self._gradient_checkpointing_func if checkpointing else None,
        )

        # Output.
        shift, scale = self.modulation_out(conditioning).unsqueeze(1).chunk(2, dim=-1)  # B 1 D
        patches = self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))  # B N P*P*C
        output = DenoiserOutput(
            sample=self._unpatchify(patches, height, width).to(hidden_states.dtype),  # B C H W
            kept_token_ids=kept_token_ids,
            prefix=prefix if return_prefix else None,
            hidden_states=hidden_states_after or None,
        )
        return output if return_dict else output.to_tuple()

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

    def _embed_conditioning(
        self, timestep: "torch.Tensor | float", class_labels: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """[B, D]: SiLU of the sum of the time and class embeddings, which every block and the output use."""
        batch_size = hidden_states.shape[0]
        timestep = torch.as_tensor(timestep, device=hidden_states.device, dtype=torch.float32)
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"Expected one timestep or {batch_size}, got shape {list(timestep.shape)}.")
        timestep = timestep.expand(batch_size) * self.config.timestep_scale
        frequencies = get_timestep_embedding(
            timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=self.config.freq_shift
        )  # B 256
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_classes, device=hidden_states.device)

        embedding = self.timestep_embedding(frequencies.to(hidden_states.dtype)) + self.class_embedding(class_labels)
        return F.silu(embedding).to(hidden_states.dtype)

    def _positions_for(self, height: int, width: int) -> torch.Tensor:
        """[N, D] for height x width tokens, scaled to the range of the training's; for that size the stored table."""
        base = self.config.sample_size // self.config.patch_size
        # A graph has no branch for one size, which would make it another graph for each kind of size.
        if not torch.compiler.is_compiling() and height == width == base:
            return self.positions
        return sincos_positions(self.positions.shape[1], height, width, base=base, device=self.positions.device)

    def _unpatchify(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, N, P*P*C] to [B, C, H, W], N = height * width tokens."""
        patch_size = self.config.patch_size
        grid = patches.unflatten(2, (patch_size, patch_size, self.out_channels)).unflatten(1, (height, width))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C h P w P -> B C H W

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # diffusers' own leaves an empty registry of hooks on a model that has none.
        if hook_names(self):
            super()._reset_stateful_cache(recurse)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None,
        kept_token_ids: list[torch.Tensor | None] | None,
        routing: RoutingCall | None,
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
        if class_labels is not None and class_labels.shape != (batch_size,):
            raise ValueError(f"Expected {batch_size} class labels, got shape {list(class_labels.shape)}.")
        if kept_token_ids is not None and routing is not None:
            raise ValueError("Expected kept_token_ids or routing, got both. Leave one out.")
        return height // patch_size, width // patch_size

    def _init_weights(self) -> None:
        """DiT's initialisation (arXiv 2212.09748, section 3.2 and appendix A); the zeros come last."""
        # Query, key and value are drawn as the one matrix that they are, as in DiT, SiT and TREAD's reference.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
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
