# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""CLIPScore: how well an image fits its prompt, by the cosine between CLIP's two embeddings (arXiv 2104.08718).

Shapes: B images, H and W their sides, E the width of the embeddings.
"""

import hashlib
import json
import logging
from typing import Any

import torch
from torch import nn

from ...fingerprint import weights_fingerprint
from ...finite import check_finite
from ...hub_errors import ADVICE, LOST
from .scorer import ScoreFunction, Scorer


DEFAULT_CLIP_MODEL = "openai/clip-vit-large-patch14"

logger = logging.getLogger(__name__)


class CLIPScore:
    """Rates images by 100 max(cos(E_image, E_text), 0), in [0, 100].

    Text-to-image papers and torchmetrics scale by 100. Equation 1 of the paper, written for captions, scales by
    w = 2.5, which is this score / 40. The prompt is used unchanged, as in torchmetrics; the paper puts "A photo
    depicts" before it.

    The image is resized with a bicubic, antialiased filter and rounded to 8 bits. For a CLIP, the shorter side is
    resized to the model's, and the image is then cropped; for a SigLIP, the whole image is resized. The processors of
    transformers differ by rounding. They are not used, because which one is loaded depends on whether torchvision is
    installed.

    Args:
        model: Network with `get_text_features` and `get_image_features`.
        tokenizer: Its tokenizer.
        image_settings: Content of its preprocessor_config.json.

    Raises:
        ValueError: Weights have NaN or infinity.
    """

    def __init__(self, model: nn.Module, tokenizer, image_settings: dict[str, Any]):
        check_finite(model.state_dict(), what="weights of the CLIP")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.size = image_settings["size"]
        self.crop_size = image_settings.get("crop_size") if image_settings.get("do_center_crop") else None
        self.mean, self.std = image_settings["image_mean"], image_settings["image_std"]
        self.max_length = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        self._has_warned = False

    @property
    def description(self) -> dict[str, Any]:
        """Identifies weights and processing (JSON)."""
        settings = [self.size, self.crop_size, self.mean, self.std, self.max_length]
        content = json.dumps([settings, weights_fingerprint(self.model)])
        return {"fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16]}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Rates images [B, 3, H, W] uint8 for B prompts. Returns scores [B]."""
        device = next(self.model.parameters()).device
        # Pad to full length, as in SigLIP's training; CLIP ignores the padding.
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        self._warn_of_long(prompts)
        texts = _pooled(self.model.get_text_features(**tokens.to(device)))  # B E
        pixels = self.prepare(images.to(device))
        return 100 * torch.cosine_similarity(_pooled(self.model.get_image_features(pixels)), texts).clamp(min=0)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resizes, crops and normalises uint8 images [B, 3, H, W] for the model."""
        # Resize.
        if "shortest_edge" in (size := _as_sides(self.size, square=self.crop_size is None)):
            short, (height, width) = size["shortest_edge"], images.shape[-2:]
            sides = (short * height // min(height, width), short * width // min(height, width))
        else:
            sides = (size["height"], size["width"])
        pixels = nn.functional.interpolate(images.float(), size=sides, mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 255).round() / 255

        # Crop, and normalise.
        if self.crop_size is not None:
            crop = _as_sides(self.crop_size, square=True)
            top, left = (sides[0] - crop["height"]) // 2, (sides[1] - crop["width"]) // 2
            pixels = pixels[..., top : top + crop["height"], left : left + crop["width"]]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _warn_of_long(self, prompts: list[str]) -> None:
        if self._has_warned:
            return
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"]]
        if too_long := sum(length > self.max_length for length in lengths):
            logger.warning(
                f"{too_long} of {len(prompts)} prompts have more than {self.max_length} tokens: CLIPScore reads their "
                "beginnings only."
            )
            self._has_warned = True


def load_clip_score(*, clip_model: str, device: str | torch.device) -> tuple[ScoreFunction, dict[str, Any]]:
    """Loads a CLIP, a SigLIP or another model with two embeddings; weights from safetensors, code from transformers.

    Args:
        clip_model: Repository on the Hub, or a local folder.
        device: Device of the network.

    Returns:
        The function, and a description that identifies it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: There is no such model, or it has no embeddings of images and texts.
    """
    try:
        from transformers import AutoModel, AutoTokenizer, ImageProcessingMixin
    except ImportError as error:
        raise ImportError(f'Expected transformers, got "{error}". Do `pip install transformers`.') from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(clip_model)
        tokenizer = AutoTokenizer.from_pretrained(clip_model)
        model = AutoModel.from_pretrained(clip_model, use_safetensors=True).float()
    except (ValueError, KeyError, *LOST) as error:
        raise ValueError(
            f"Expected a CLIP with safetensors, tokenizer and preprocessor_config.json at {clip_model}, got {error}. "
            f"{ADVICE}"
        ) from error
    if not all(hasattr(model, name) for name in ("get_text_features", "get_image_features")):
        raise ValueError(
            f"Expected a model that embeds images and texts, got {type(model).__name__} of {clip_model}. Use a CLIP "
            "or a SigLIP."
        )
    score = CLIPScore(model.to(device), tokenizer, settings)
    return score, {"model": clip_model, **score.description}


CLIP_SCORE = Scorer(label="CLIPScore", load=load_clip_score)


def _pooled(features) -> torch.Tensor:
    """The embeddings [B, E] from the output of `get_..._features`: a tensor or, since transformers 5, an object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def _as_sides(size: int | dict[str, int], *, square: bool) -> dict[str, int]:
    """Reads 224 as both sides or as the shorter side; returns dictionaries unchanged."""
    if isinstance(size, dict):
        return size
    return {"height": size, "width": size} if square else {"shortest_edge": size}
