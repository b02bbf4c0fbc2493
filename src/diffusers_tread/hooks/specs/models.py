# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The specs of models: facts that routing needs and that the specs of their blocks do not give.

Functions that return a `Window` find the routable tokens from the arguments of a model's forward. All other tokens
(text, padding, time, registers, reference images, history) are conditions and never routed. Those that return a tuple
find the grid of the routable tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .types import ModelSpec, Window


# Attributes that hold a model's main stacks, in the order they run.
MAIN_STACKS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "visual_transformer_blocks",
    "blocks",
    "layers",
    "single_transformer_blocks",
    "single_stream_blocks",
)

Arguments = Mapping[str, Any]


def _patched_size(model: torch.nn.Module, size: torch.Size) -> int:
    """Number of tokens of a grid [..., H, W] or [..., F, H, W] of latents."""
    return math.prod(_patched(model, size))


def _patched(model: torch.nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of tokens of latents [H, W] or [F, H, W]."""
    patch_size, patch_size_t = model.config.get("patch_size", 1), model.config.get("patch_size_t") or 1
    patch = (patch_size_t, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return tuple(length // p for length, p in zip(size, patch[-len(size) :], strict=True))


def _latent_grid(model: torch.nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """The grid for latents [B, C, H, W] or [B, C, F, H, W]."""
    return _patched(model, arguments["hidden_states"].shape[2:])


def _frames_first_grid(model: torch.nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """The grid for latents [B, F, C, H, W]."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return _patched(model, (frames, height, width))


def _named_grid(model: torch.nn.Module, arguments: Arguments) -> tuple[int, ...] | None:
    """The grid for latents given as tokens, from the size given with them."""
    size: Any = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if None in size else size


def _qwen_grid(model: torch.nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """The grid of the first image of each sample; a layered model has several images to denoise, and so no grid."""
    return _only({tuple(shapes[0]) for shapes in arguments["img_shapes"]})


def _grid_at_end(model: torch.nn.Module, arguments: Arguments) -> Window:
    num_tokens = _patched_size(model, arguments["hidden_states"].shape[2:])
    return Window(-num_tokens, num_tokens)


def _grid_at_start(model: torch.nn.Module, arguments: Arguments) -> Window:
    return Window(0, _patched_size(model, arguments["hidden_states"].shape[2:]))


def _sequence_at_end(model: torch.nn.Module, arguments: Arguments) -> Window:
    num_tokens = arguments["hidden_states"].shape[1]
    return Window(-num_tokens, num_tokens)


def _sequence_at_start(model: torch.nn.Module, arguments: Arguments) -> Window:
    return Window(0, arguments["hidden_states"].shape[1])


def _audio_at_end(model: torch.nn.Module, arguments: Arguments) -> Window:
    num_tokens = arguments["hidden_states"].shape[2] // model.config.get("patch_size", 1)
    return Window(-num_tokens, num_tokens)


def _after_caption(model: torch.nn.Module, arguments: Arguments) -> Window:
    """Lumina 2: [caption_i, image, padding], captions of different lengths."""
    num_tokens = _patched_size(model, arguments["hidden_states"].shape[2:])
    return Window(arguments["encoder_attention_mask"].sum(dim=1), num_tokens)


def _z_image(model: torch.nn.Module, arguments: Arguments) -> Window:
    """[image_i, padding, caption_i, padding], with images in a list of [C, F, H, W]."""
    images = arguments["x"]
    if isinstance(images[0], (list, tuple)):
        raise ValueError("Expected one image per sample, got lists of them: Z-Image's omni mode cannot be routed.")
    patch_size, patch_size_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    patch = (patch_size_t, patch_size, patch_size)
    sizes = {math.prod(n // p for n, p in zip(image.shape[1:], patch, strict=True)) for image in images}
    return Window(0, _only(sizes))


def _qwen_image(model: torch.nn.Module, arguments: Arguments) -> Window | None:
    """[latents, reference images]; in a layered model all images except the last are latents."""
    shapes = arguments.get("img_shapes")
    if not shapes or not isinstance(shapes[0], (list, tuple)) or not isinstance(shapes[0][0], (list, tuple)):
        return None
    layered = model.config.get("use_layer3d_rope", False)
    return Window(0, _only({sum(math.prod(s) for s in (x[:-1] if layered else x[:1])) for x in shapes}))


def _qwen_image21(model: torch.nn.Module, arguments: Arguments) -> Window:
    """[text and reference images, target image]."""
    num_tokens = math.prod(arguments["img_shapes"][0][-1])
    return Window(-num_tokens, num_tokens)


def _joy_image(model: torch.nn.Module, arguments: Arguments) -> Window:
    """[target, other items]: with several items [B, items, C, F, H, W] the model moves the target to the front."""
    size = arguments["hidden_states"].shape[-3:]
    return Window(0, math.prod(n // p for n, p in zip(size, model.config.patch_size, strict=True)))


def _joy_image_plus(model: torch.nn.Module, arguments: Arguments) -> Window:
    """[target, reference images, padding]."""
    return Window(0, _only({math.prod(shapes[0]) for shapes in arguments["shape_list"]}))


def _ideogram4(model: torch.nn.Module, arguments: Arguments) -> Window:
    """`indicator` is 2 on image tokens, which are contiguous in each sample."""
    is_image = arguments["indicator"] == 2
    return Window(is_image.int().argmax(dim=1), _only(set(is_image.sum(dim=1).tolist())))


def _minimax_h3(model: torch.nn.Module, arguments: Arguments) -> Window:
    """The video tokens of a packed sequence; the audio is never routed."""
    first, last = arguments["video_indices"][[0, -1]].tolist()
    if last - first + 1 != len(arguments["video_indices"]):
        raise ValueError("Expected the video tokens in one stretch of the packed sequence, got several.")
    return Window(first, last - first + 1)


def _only(sizes: set) -> Any:
    if len(sizes) != 1:
        raise ValueError(
            f"Expected samples with the same number of image tokens, got {sorted(sizes)}. Sort the batches by size."
        )
    return sizes.pop()


_KEY_CACHE = "cached keys stand for tokens by position"

MODEL_SPECS: dict[str, ModelSpec] = {
    "BriaFibo2Transformer2DModel": ModelSpec(window=_grid_at_start),  # its blocks' `noise_mask` tells the start
    "CogVideoXTransformer3DModel": ModelSpec(grid=_frames_first_grid),
    "ConsisIDTransformer3DModel": ModelSpec(grid=_frames_first_grid),
    "ErnieImageTransformer2DModel": ModelSpec(window=_grid_at_start, grid=_latent_grid),
    "Flux2Transformer2DModel": ModelSpec(must_be_none={"kv_cache_mode": _KEY_CACHE}),
    "Flux3Transformer2DModel": ModelSpec(
        stacks=("mode_blocks.image", "single_transformer_blocks"), window=_sequence_at_start
    ),
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec(window=_grid_at_end, grid=_latent_grid),
    "Ideogram4Transformer2DModel": ModelSpec(window=_ideogram4),
    "JoyImageEditPlusTransformer3DModel": ModelSpec(window=_joy_image_plus),
    "JoyImageEditTransformer3DModel": ModelSpec(window=_joy_image),
    "Krea2Transformer2DModel": ModelSpec(window=_sequence_at_end),
    "LTXVideoTransformer3DModel": ModelSpec(grid=_named_grid),
    "Lumina2Transformer2DModel": ModelSpec(window=_after_caption),
    "MiniMaxH3Transformer3DModel": ModelSpec(window=_minimax_h3),
    "MiniMaxMusic3Transformer1DModel": ModelSpec(window=_audio_at_end),
    "OmniGenTransformer2DModel": ModelSpec(window=_grid_at_end, grid=_latent_grid),
    "QwenImage21Transformer2DModel": ModelSpec(window=_qwen_image21, must_be_none={"kv_cache": _KEY_CACHE}),
    "QwenImageTransformer2DModel": ModelSpec(window=_qwen_image, grid=_qwen_grid),
    "StableAudio3DiTModel": ModelSpec(window=_audio_at_end),
    "StableAudioDiTModel": ModelSpec(window=_audio_at_end),
    "ZImageTransformer2DModel": ModelSpec(window=_z_image),
    # Their blocks' specs give the routable tokens, and their latents the grid.
    **dict.fromkeys(
        (
            "AllegroTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "AuraFlowTransformer2DModel",
            "ChronoEditTransformer3DModel",
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "CosmosTransformer3DModel",
            "DiTTransformer2DModel",
            "EasyAnimateTransformer3DModel",
            "GlmImageTransformer2DModel",
            "HiDreamImageTransformer2DModel",
            "HunyuanDiT2DModel",
            "HunyuanImageTransformer2DModel",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanVideoTransformer3DModel",
            "LuminaNextDiT2DModel",
            "MochiTransformer3DModel",
            "MotifVideoTransformer3DModel",
            "PRXTransformer2DModel",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "SanaTransformer2DModel",
            "SanaVideoTransformer3DModel",
            "SanaWMTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimateTransformer3DModel",
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
        ),
        ModelSpec(grid=_latent_grid),
    ),
}


def register_model_spec(name: str, spec: ModelSpec) -> None:
    """Registers a spec for `apply_token_routing` on models of the class `name` and of its subclasses."""
    MODEL_SPECS[name] = spec
