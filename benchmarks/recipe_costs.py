# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the recipes of docs/imagenet.md take, counted without a GPU and without data: estimates, not measurements.

    python benchmarks/recipe_costs.py

Hours are all FLOPs divided by the rate of eight H100 at 40 % of their dense bfloat16 peak. FLOPs are the model's
forward and backward with its routes (three times the forward), the projectors' likewise, and one forward each of the
vision encoder and the VAE that run beside them. Reading, sampling, checkpoints and routing's gathers are left out.

Memory is that of one of eight GPUs with DDP: 20 bytes per parameter (float32 weights, gradients, two moments, average)
and what the forward keeps for the backward in bfloat16, counted on the meta device. It excludes attention scores,
which fused attention does not keep, but includes two scaled copies that it does not keep either. For S/2 in float32
that is 9 % above what `memory.py` measured. Autocast's float32 copies, communication buffers, the encoders' weights
and the allocator's losses are left out.
"""

import json
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch.autograd.graph import saved_tensors_hooks

from diffusers_tread.flops import forward_flops
from diffusers_tread.objectives.terms.alignment import make_projector
from diffusers_tread.routing import RoutingCall
from diffusers_tread.routing.route import num_kept_tokens
from diffusers_tread.runs.config import TrainConfig
from diffusers_tread.runs.presets import parse_train_config
from diffusers_tread.runs.setup import UnseenSource, make_model


NUM_GPUS = 8
PEAK_FLOPS = 989e12
"""Of an H100 SXM, dense bfloat16 (NVIDIA's data sheet)."""
UTILISATION = 0.4
RECIPES = (
    "imagenet256_xl2",
    "imagenet256_srdit_b1",
    "imagenet256_lightningdit_xl1",
    "imagenet256_repa_xl2",
    "imagenet256_jit_b16",
)

# Of SD's VAE, and of the f16d32 ones: VA-VAE's published sizes, which E2E-INVAE is assumed to share.
_VAES = {
    4: {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4},
    32: {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 32},
}
_DINOV2_WIDTH = 768


@dataclass(frozen=True, kw_only=True)
class RecipeCost:
    """FLOPs per image and step, and what they come to."""

    num_parameters: int
    model: float
    """Forward and backward on the routes."""
    projectors: float
    """Forward and backward of the alignment's heads."""
    encoder: float
    """Of the vision encoder's forward."""
    vae: float
    """Of the VAE's encoder."""
    num_images: int
    """Of the whole run."""
    gibibytes: float
    """On one of eight GPUs."""

    @property
    def hours(self) -> float:
        """On eight H100, stored latents and features or not."""
        return self._hours(self.model + self.projectors + self.encoder + self.vae)

    @property
    def hours_of_model(self) -> float:
        """Without the VAE and the vision encoder, as with stored latents and features."""
        return self._hours(self.model + self.projectors)

    def _hours(self, flops: float) -> float:
        return self.num_images * flops / (NUM_GPUS * PEAK_FLOPS * UTILISATION) / 3600


def recipe_cost(name: str) -> RecipeCost:
    """Counts a recipe of `diffusers_tread.runs.presets`."""
    config = parse_train_config(["--recipe", name])
    source = UnseenSource(config)
    with torch.device("meta"):
        model = make_model(config, source)
    num_parameters = model.num_parameters()

    # The model and what is aligned with it.
    alignment = json.loads(config.loss_terms).get("alignment")
    num_tokens = (model.config.sample_size // model.config.patch_size) ** 2
    projectors = 0
    for block in alignment["blocks"] if alignment else ():
        with torch.device("meta"):
            head = make_projector(model.modulation_out.in_features, 2048, _DINOV2_WIDTH)
        num_parameters += sum(parameter.numel() for parameter in head.parameters())
        routes = [route for route in model.token_router.routes if route.start <= block <= route.end]
        kept = num_kept_tokens(num_tokens, routes[0].selection_ratio) if routes else num_tokens
        projectors += 3 * 2 * kept * sum(layer.weight.numel() for layer in head[::2])
    images_per_gpu = config.train_batch_size
    kept_bytes = images_per_gpu * activation_bytes(model, torch.bfloat16)
    return RecipeCost(
        num_parameters=num_parameters,
        model=3 * forward_flops(model).total,
        projectors=projectors,
        encoder=encoder_flops(round(num_tokens**0.5)) if alignment else 0,
        vae=vae_flops(config, source.channels) if config.pretrained_vae_name_or_path else 0,
        num_images=config.max_train_steps * images_per_gpu * NUM_GPUS,
        gibibytes=(20 * num_parameters + kept_bytes) / 2**30,
    )


def encoder_flops(side: int) -> int:
    """A forward of DINOv2-B on an image of side x side patches."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        encoder = Dinov2Model(Dinov2Config(patch_size=14, image_size=14 * side))  # its other sizes are B's
    return forward_flops(encoder, {"pixel_values": torch.empty(1, 3, 14 * side, 14 * side)}).total


def vae_flops(config: TrainConfig, latent_channels: int) -> int:
    """A forward of the VAE's encoder on an image."""
    sizes = _VAES[latent_channels]
    num_levels = len(sizes["block_out_channels"])
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * num_levels,
            up_block_types=["UpDecoderBlock2D"] * num_levels,
            layers_per_block=2,
            **sizes,
        )
    return forward_flops(vae.encoder, {"sample": torch.empty(1, 3, config.resolution, config.resolution)}).total


def activation_bytes(model: torch.nn.Module, dtype: torch.dtype, *, selection_ratio: float | None = None) -> int:
    """What a forward of one image keeps for its backward, each tensor once, without weights and attention scores.

    Args:
        model: On the meta device; it is cast.
        dtype: Of weights and values.
        selection_ratio: None for the routes' own, 0.0 for dense.
    """
    for parameter in model.train().parameters():  # not by `to`, which warns of weights that stay float32
        parameter.data = parameter.data.to(dtype)
    config = model.config
    size = (1, config.in_channels, config.sample_size, config.sample_size)
    held = [parameter.untyped_storage() for parameter in model.parameters()]  # so that no address is given twice
    sizes = {storage._cdata: 0 for storage in held}

    def keep(tensor):
        is_score = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 1
        storage = tensor.untyped_storage()
        held.append(storage)
        if not is_score:
            sizes.setdefault(storage._cdata, storage.nbytes())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        routing = RoutingCall(enabled=True, selection_ratio=selection_ratio)
        inputs = torch.empty(size, dtype=dtype, device="meta"), torch.empty(1, device="meta")
        model(*inputs, torch.zeros(1, dtype=torch.int64, device="meta"), routing=routing)
    return sum(sizes.values())


def table_row(name: str) -> str:
    """As docs/imagenet.md has it."""
    cost = recipe_cost(name)
    parts = [cost.model, cost.projectors, cost.encoder, cost.vae]
    numbers = " + ".join(f"{part / 1e12:.3f}" for part in parts if part)
    hours = f"{cost.hours:.1f}"
    if cost.encoder or cost.vae:
        hours += f" ({cost.hours_of_model:.1f})"
    return f"| `{name}` | {cost.num_parameters / 1e6:.0f}M | {numbers} | {cost.gibibytes:.0f} GiB | {hours} |"


def main() -> None:
    print("| recipe | parameters | TFLOPs an image | memory of a GPU | hours |\n|---|---|---|---|---|")
    for name in RECIPES:
        print(table_row(name))


if __name__ == "__main__":
    main()
