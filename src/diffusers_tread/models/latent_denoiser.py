# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The base class of this package's class-conditional denoisers: everything but their blocks.

As in DiT (arXiv 2212.09748), latents become patches with positions, and time and class modulate blocks and output.
Shapes: B batch, C latent channels, H and W latent size, P patch size, N = (H / P) * (W / P) tokens, K kept tokens,
D width.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    get_1d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_utils import ModelMixin

from ..routing import (
    RoutedStack,
    RoutingCall,
    TokenRoute,
    TokenRouter,
    check_can_drop_path,
    check_can_fuse,
    check_can_route,
    default_route,
    hook_names,
    make_fusions,
)
from ..routing.ops import out_of_range
from .modeling_outputs import DenoiserOutput


if TYPE_CHECKING:
    from typing_extensions import Self


Routes = Literal["default"] | Iterable[TokenRoute | Mapping[str, Any]] | None


class LatentDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A denoiser of latents; subclasses add the blocks.

    The constructor of a subclass calls `_make_input`, sets `transformer_blocks`, a `RoutedStack` whose blocks each
    have a linear layer `modulation` of the conditioning, and calls `_make_output`. Its config has at least
    `num_layers`, `in_channels`, `out_channels`, `sample_size`, `patch_size`, `num_classes`, `routes`,
    `timestep_scale`, `objective`, `norm_eps` and `freq_shift`; `patch_bottleneck_dim` is optional.
    """

    _presets: Mapping[str, Mapping[str, Any]] = {}
    """Preset name to the config values of that size."""
    _route_unit: Literal["token", "row"] = "token"
    """The `unit` of the default route."""

    transformer_blocks: RoutedStack

    _supports_gradient_checkpointing = True
    _supports_prefix = True
    _skip_layerwise_casting_patterns = [
        "patch_embedding",
        "timestep_embedding",
        "class_embedding",
        "norm",
        "^proj_out",
        "route_fusions",
    ]

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...

        @classmethod
        def from_config(cls, config: Any = None, **kwargs: Any) -> Self: ...

        @overload
        def __call__(
            self,
            hidden_states: torch.Tensor,
            timestep: torch.Tensor | float,
            class_labels: torch.Tensor | None = None,
            kept_token_ids: list[torch.Tensor | None] | None = None,
            return_dict: Literal[True] = True,
            *,
            routing: RoutingCall | None = None,
            prefix: torch.Tensor | None = None,
            return_prefix: bool = False,
            hidden_states_at: Iterable[int] = (),
        ) -> DenoiserOutput: ...
        @overload
        def __call__(
            self,
            hidden_states: torch.Tensor,
            timestep: torch.Tensor | float,
            class_labels: torch.Tensor | None = None,
            kept_token_ids: list[torch.Tensor | None] | None = None,
            *,
            return_dict: Literal[False],
            routing: RoutingCall | None = None,
            prefix: torch.Tensor | None = None,
            return_prefix: bool = False,
            hidden_states_at: Iterable[int] = (),
        ) -> tuple[Any, ...]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @classmethod
    def presets(cls) -> list[str]:
        """The names that `from_preset` knows."""
        return list(cls._presets)

    @classmethod
    def preset_config(cls, preset: str) -> dict[str, Any]:
        """The config values of a preset; some presets also set `in_channels` and `sample_size`."""
        return dict(cls._presets[preset])

    @classmethod
    def from_preset(cls, preset: str, **config: Any) -> "Self":
        """A model of one of the published sizes.

        Args:
            preset: One of `presets()`, such as "XL/2": size and patch size.
            **config: Arguments of the constructor, such as `sample_size`, `in_channels`, `num_classes`, `routes` and
                `objective`.

        Raises:
            ValueError: Unknown preset; else as the constructor.
            TypeError: An argument that the constructor does not have.
        """
        if preset not in cls._presets:
            raise ValueError(f"Expected a preset among {cls.presets()}, got {preset!r}.")
        return cls(**{**cls._presets[preset], **config})

    def _make_input(self, dim: int, *, positions: bool = True) -> None:
        """Makes the routes, and the embeddings of patches, positions, time and class.

        Args:
            dim: D, the width.
            positions: Whether sine-cosine positions are added to the patches.

        Raises:
            ValueError: A config value is out of range.
        """
        # Checks.
        config = self.config
        if dim < 4 or dim % 4:
            raise ValueError(f"Expected a width divisible by 4, at least 4, for the 2D positions, got {dim}.")
        if config.num_layers < 1:
            raise ValueError(f"Expected num_layers >= 1, got {config.num_layers}.")
        if config.patch_size < 1 or config.sample_size < 1 or config.sample_size % config.patch_size:
            raise ValueError(
                f"Expected sample_size divisible by patch_size {config.patch_size}, got {config.sample_size}."
            )
        if config.num_classes < 0:
            raise ValueError(f"Expected num_classes >= 0 (0: unconditional), got {config.num_classes}.")
        if config.freq_shift not in (0, 1):
            raise ValueError(f"Expected freq_shift 0 or 1, got {config.freq_shift!r}.")

        # Routes.
        routes = default_route(config.num_layers, self._route_unit) if config.routes == "default" else config.routes
        self.token_router = TokenRouter(routes, num_layers=config.num_layers)
        self.register_to_config(routes=[route.to_dict() for route in self.token_router.routes] or None)
        self.route_fusions = make_fusions(self.token_router.routes, dim)

        # Embeddings.
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        patch_size, bottleneck = config.patch_size, config.get("patch_bottleneck_dim")
        if bottleneck is None:
            self.patch_embedding = nn.Conv2d(config.in_channels, dim, kernel_size=patch_size, stride=patch_size)
        else:
            self.patch_embedding = BottleneckPatchEmbedding(config.in_channels, dim, patch_size, bottleneck)
        self.timestep_embedding = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)
        base = config.sample_size // patch_size
        table = sincos_positions(dim, base, base, base=base) if positions else None  # N D
        self.register_buffer("position_table", table, persistent=False)

    def _make_output(self, dim: int, *, norm: nn.Module | None = None) -> None:
        """Makes the last norm (None: DiT's), its modulation and the projection to patches, then sets all weights."""
        self.norm_out = nn.LayerNorm(dim, eps=self.config.norm_eps, elementwise_affine=False) if norm is None else norm
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, self.config.patch_size**2 * self.out_channels)

        self.gradient_checkpointing = False
        self._init_weights()

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
        """Predicts what the model's objective needs (EDM: the raw network F, flow: noise - data, JiT: the data).

        Args:
            hidden_states: [B, C, H, W] latents, H and W divisible by the patch size.
            timestep: [B] or one for all, as the scheduler gives it (EDM: ln(sigma) / 4, flow: sigma * 1000). Give
                a compiled forward a tensor: it makes a new graph for each value of a Python float.
            class_labels: [B] int64 in [0, num_classes]; None for the null class. The range is checked on the CPU only,
                because elsewhere every step would wait for the device; the pipeline and the training script check it.
            kept_token_ids: Per route the ids of the kept tokens, [B, K] int64 in [0, N), sorted ascending, each once,
                or None for a route not taken, as from `TokenRouter.plan`; whole rows for RWKV. Scans and shifts
                take the tokens in this order. None: the token router chooses them, and dropped paths too.
            return_dict: Whether to return a `DenoiserOutput` or a tuple.
            routing: How this forward routes; `token_routing` and the router's defaults decide the fields left None.
            prefix: [B, N, D], the tokens before the first route's first block, from another forward with the same
                `hidden_states`, `timestep` and `class_labels`; the earlier blocks are then not run. The prefix does
                not depend on what is routed away, so the branches of Sparse Guidance share it. It has D more channels
                if blocks pass on more than tokens, and for each earlier state that a route rejoins with
                (`TokenRoute.rejoin_from`).
            return_prefix: Whether to return `prefix`.
            hidden_states_at: Indices of blocks, 0-based, whose output tokens to return, for losses on them.

        Returns:
            `sample`: [B, out_channels, H, W] in the dtype of `hidden_states`; the `kept_token_ids` that were used;
            `prefix` and `hidden_states`. A tuple leaves out those that are None.

        Raises:
            ValueError: Wrong number of channels, timesteps or labels; labels out of range; a size not divisible by the
                patch size; both `kept_token_ids` and `routing`; a routed forward with a cache or context parallelism;
                any forward with a cache if a route has a fusion; a dropped path with group offloading; else as
                `RoutedStack.forward`.
        """
        # Patches and positions.
        height, width = self._check_inputs(hidden_states, class_labels, kept_token_ids, routing)
        # The residual stream keeps this layout: if it were not contiguous, each norm and product would copy it.
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # B N D
        # Added in the input's dtype: under autocast the residual stream then stays in fp32, and bfloat16 positions
        # are the same whether the model was cast by `to` or by `from_pretrained`.
        if self.position_table is not None:
            tokens = tokens + self._positions_for(height, width).to(hidden_states.dtype)  # N D
        tokens = tokens.to(hidden_states.dtype)
        conditioning = self._embed_conditioning(timestep, class_labels, hidden_states)  # B D

        # Routing.
        path_drops = None
        if kept_token_ids is None:
            router, how = self.token_router, {"training": self.training, "call": routing}
            how["seed"] = router.forward_seed(tokens.device, routing) if router.is_dropping(**how) else None
            kept_token_ids = router.plan(tokens, **how, grid_size=(height, width))
            path_drops = router.plan_drops(tokens, **how)
        self._check_setup(kept_token_ids, path_drops)

        # Blocks.
        per_token, shared = self._block_arguments(tokens, conditioning, height, width)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        tokens, prefix, hidden_states_after = self.transformer_blocks(
            tokens,
            *shared,
            per_token=per_token,
            routes=self.token_router.routes,
            kept_token_ids=kept_token_ids,
            fusions=self.route_fusions,
            path_drops=path_drops,
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

    def _block_arguments(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, height: int, width: int
    ) -> tuple[list[torch.Tensor | None], tuple[Any, ...]]:
        """The arguments that a block gets after its tokens: first those shared by all tokens, then those per token.

        Args:
            tokens: [B, N, D], before the first block.
            conditioning: [B, D].
            height: Rows of tokens.
            width: Columns of tokens.

        Returns:
            `per_token` and `shared` of `RoutedStack.forward`.
        """
        return [], (conditioning,)

    def _embed_conditioning(
        self, timestep: "torch.Tensor | float", class_labels: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """[B, D]: SiLU of the sum of the time and class embeddings, used by every block and the output."""
        # Frequencies of the time, and labels.
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

        # Their sum.
        embedding = self.timestep_embedding(frequencies.to(hidden_states.dtype)) + self.class_embedding(class_labels)
        return F.silu(embedding).to(hidden_states.dtype)

    def _positions_for(self, height: int, width: int) -> torch.Tensor:
        """[N, D] for height x width tokens, scaled to the training grid's range; for its own size the stored table."""
        base = self.config.sample_size // self.config.patch_size
        # No branch on the size while compiling: it would make separate graphs for the training size and others.
        if not torch.compiler.is_compiling() and height == width == base:
            return self.position_table
        return sincos_positions(
            self.position_table.shape[1], height, width, base=base, device=self.position_table.device
        )

    def _unpatchify(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, N, P*P*C] to [B, C, H, W], N = height * width tokens."""
        patch_size = self.config.patch_size
        grid = patches.unflatten(2, (patch_size, patch_size, self.out_channels)).unflatten(1, (height, width))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C h P w P -> B C H W

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # diffusers' method would leave an empty hook registry on a model that has no hooks.
        if hook_names(self):
            super()._reset_stateful_cache(recurse)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None,
        kept_token_ids: list[torch.Tensor | None] | None,
        routing: RoutingCall | None,
    ) -> tuple[int, int]:
        """Checks the inputs without waiting for the device; returns the grid's height and width in tokens."""
        # Latents.
        patch_size, in_channels = self.config.patch_size, self.config.in_channels
        if hidden_states.dim() != 4 or hidden_states.shape[1] != in_channels:
            raise ValueError(f"Expected latents [B, {in_channels}, H, W], got {list(hidden_states.shape)}.")
        batch_size, _, height, width = hidden_states.shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"Expected height and width divisible by the patch size {patch_size}, got {height}x{width}."
            )

        # Labels.
        if class_labels is not None and class_labels.shape != (batch_size,):
            raise ValueError(f"Expected {batch_size} class labels, got shape {list(class_labels.shape)}.")
        if class_labels is not None:
            null_class = self.config.num_classes
            if wrong := out_of_range(class_labels, null_class + 1):
                raise ValueError(f"Expected class ids in [0, {null_class}] (the last is the null class), got {wrong}.")
        if kept_token_ids is not None and routing is not None:
            raise ValueError("Expected kept_token_ids or routing, got both. Leave one out.")
        return height // patch_size, width // patch_size

    def _check_setup(
        self, kept_token_ids: list[torch.Tensor | None] | None, path_drops: "list[torch.Tensor | bool] | None"
    ) -> None:
        """Raises ValueError if the model has a cache, parallelism or offloading that its routes do not support."""
        if self.route_fusions:
            check_can_fuse(self)
        if kept_token_ids is not None:
            check_can_route(self)
        if path_drops is not None and any(drop is True for drop in path_drops):
            check_can_drop_path(self)

    def _init_weights(self) -> None:
        """DiT's initialisation (arXiv 2212.09748, section 3.2 and appendix A); the zeros come last."""
        # Query, key and value are initialised as one matrix, as in DiT, SiT and TREAD's reference.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.patch_embedding.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # Embeddings and fusions.
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.linear_2.weight, std=0.02)
        for fusion in self.route_fusions.values():
            fusion.reset_parameters()

        # adaLN-Zero: every block starts as the identity, and the output is 0.
        for module in [block.modulation for block in self.transformer_blocks] + [self.modulation_out, self.proj_out]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class BottleneckPatchEmbedding(nn.Sequential):
    """Embeds patches by two linear maps with few channels and no activation between them (JiT, arXiv 2511.13720).

    Args:
        in_channels: C, of the latents or pixels.
        dim: D, the tokens' width.
        patch_size: P.
        bottleneck_dim: Channels between the maps, the first of which has no bias.

    Raises:
        ValueError: `bottleneck_dim` is not an int of at least 1.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, bottleneck_dim: int):
        if not isinstance(bottleneck_dim, int) or bottleneck_dim < 1:
            raise ValueError(f"Expected patch_bottleneck_dim >= 1, or None for none, got {bottleneck_dim!r}. Use 128.")
        super().__init__(
            nn.Conv2d(in_channels, bottleneck_dim, kernel_size=patch_size, stride=patch_size, bias=False),
            nn.Conv2d(bottleneck_dim, dim, kernel_size=1),
        )
        self.out_channels = dim


def sincos_positions(
    dim: int, height: int, width: int, *, base: int, device: "torch.device | str | None" = None
) -> torch.Tensor:
    """Fixed 2D sine-cosine position embeddings (arXiv 2111.06377), computed in float64 and rounded.

    The scaled rows and columns are float32, so the result is bit-identical to diffusers': exact for the training grid
    and its power-of-two multiples, else off by a rounding.

    Args:
        dim: D, divisible by 4.
        height: Rows of tokens.
        width: Columns of tokens.
        base: Rows and columns are scaled to [0, base), the range of the training grid.
        device: Device of the result.

    Returns:
        [height * width, D] float32, tokens in row-major order; the first half of the channels encodes the column.
    """
    # diffusers' function for two dimensions would compile separate graphs for square and other images.
    rows, columns = (
        get_1d_sincos_pos_embed_from_grid(
            dim // 2, torch.arange(size, device=device, dtype=torch.float32) / (size / base), output_type="pt"
        )
        for size in (height, width)
    )  # h D/2, w D/2
    rows, columns = rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1)  # h w D/2
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()
