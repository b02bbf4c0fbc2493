# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Config of text-to-image training runs, with presets and recipes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import parse_caption_columns
from ..objectives import FlowMatchingObjective
from .config import RunConfig
from .parsing import read_json


DEFAULT_ROUTES = '[{"start": 2, "end": -4}]'


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig(RunConfig):
    """Settings for training the transformer of a diffusers text-to-image pipeline, from scratch or further.

    Raises:
        ValueError: As for `RunConfig`; caption columns or prompts are not valid; no transformer is given, or two.
    """

    dry_run: bool = False
    """Print the settings and write nothing to the output folder. Pipeline and data are loaded nevertheless."""

    # Data.
    caption_column: str = "text"
    """Column with captions, or several with their probabilities, such as long:0.8,short:0.2."""
    proportion_empty_prompts: float = 0.1
    """Share of captions, in [0, 1], replaced by the empty one, for classifier-free guidance."""

    # Pipeline.
    pretrained_model_name_or_path: str | None = None
    """Folder or repository of a pipeline that gives the VAE, text encoders and tokenizers. Without preset and
    transformer_config_name_or_path, its transformer is trained further."""
    preset: str | None = None
    """Kind and size of a new transformer: prx-s or sd3-s."""
    transformer_config_name_or_path: str | None = None
    """Config of a new transformer, instead of a preset: a model folder, a JSON file or the JSON itself, with
    `_class_name`."""
    parts: str = "{}"
    """Where to load other parts, as JSON, such as {"vae": "folder", "text_encoder": ["repository", "subfolder"]}."""
    max_sequence_length: int | None = None
    """Maximal number of tokens of a caption, the rest is cut off; None for the pipeline's default."""
    call_options: str = "{}"
    """More arguments of the pipeline's call as JSON, such as {"guidance_scale": 3.5} for distilled models."""

    # Prompts of samples.
    validation_prompts: str | None = None
    """Prompts of the sample grids: a JSON list, or a text file with one prompt per line."""
    eval_prompts: str | None = None
    """Prompts of the samples for the FID, as a list or a file likewise; they are used in turn."""

    def __post_init__(self):
        super().__post_init__()
        parse_caption_columns(self.caption_column)
        if not 0.0 <= self.proportion_empty_prompts <= 1.0:
            raise ValueError(f"Expected --proportion_empty_prompts in [0, 1], got {self.proportion_empty_prompts}.")
        if self.preset is not None and self.transformer_config_name_or_path is not None:
            raise ValueError("Expected --preset or --transformer_config_name_or_path, got both.")
        if self.pretrained_model_name_or_path is None and self.transformer_values() is None:
            raise ValueError(
                "Expected --preset or --transformer_config_name_or_path for a new transformer, or a pipeline to train "
                "further as --pretrained_model_name_or_path, got none of them."
            )
        for steps, prompts in (("validation_steps", "validation_prompts"), ("eval_steps", "eval_prompts")):
            if getattr(self, steps) is not None and not self.prompts(prompts):
                raise ValueError(f"Expected --{prompts}, a JSON list or a file with one per line, with --{steps}.")

    @property
    def objective(self) -> str:
        """Flow matching, the objective of these pipelines."""
        return FlowMatchingObjective.name

    def transformer_values(self) -> dict[str, Any] | None:
        """The config of a new transformer; None to train the pipeline's own further.

        Raises:
            ValueError: There is no such preset or file.
        """
        if self.preset is not None:
            if self.preset not in TEXT_PRESETS:
                raise ValueError(f"Expected a preset among {list(TEXT_PRESETS)}, got {self.preset!r}.")
            return dict(TEXT_PRESETS[self.preset])
        source = self.transformer_config_name_or_path
        return None if source is None else read_json(source)

    def prompts(self, field: str) -> list[str]:
        """The prompts of a field. Raises ValueError if it is neither a JSON list of texts nor a file."""
        text = getattr(self, field)
        if text is None:
            return []
        try:
            is_list = text.lstrip().startswith("[")
            found = json.loads(text) if is_list else Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected --{field} as a JSON list or a text file, got {text!r} ({error}).") from error
        found = [prompt for prompt in found if prompt.strip()] if not is_list else found
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
            raise ValueError(f"Expected texts in --{field}, got {found}.")
        return found

    def data_options(self) -> dict[str, Any]:
        return super().data_options() | {"captions": parse_caption_columns(self.caption_column)}


TEXT_PRESETS: dict[str, dict[str, Any]] = {
    # Small variants of PRX-1.2B and SD3-medium with about DiT-B's depth and width. Never trained to the end here.
    "prx-s": {
        "_class_name": "PRXTransformer2DModel",
        "in_channels": 16,
        "patch_size": 2,
        "context_in_dim": 2304,
        "hidden_size": 576,
        "mlp_ratio": 3.5,
        "num_heads": 9,
        "depth": 14,
        "axes_dim": [32, 32],
    },
    "sd3-s": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 64,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 12,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 512,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 64,
    },
}


@dataclass(frozen=True)
class TextRecipe:
    """A run on eight processes. None of them has been run to its end with this package."""

    preset: str
    """Size of the transformer."""
    resolution: int
    """Side of the images in pixels."""
    pretrained: str | None
    """Pipeline that gives the text encoders and the VAE; None if `parts` gives them."""
    parts: dict[str, Any]
    """As `TextTrainConfig.parts`."""
    batch_size: int
    """Images per optimiser step, over all processes."""
    learning_rate: float
    """Learning rate of AdamW."""

    def settings(self) -> dict[str, Any]:
        """Values for the fields of `TextTrainConfig`, except for the data."""
        return {
            "preset": self.preset,
            "resolution": self.resolution,
            "pretrained_model_name_or_path": self.pretrained,
            "parts": json.dumps(self.parts),
            "train_batch_size": self.batch_size // 8,
            "max_train_steps": 200_000,
            "learning_rate": self.learning_rate,
            "lr_warmup_steps": 1000,
            "mixed_precision": "bf16",
            "use_ema": True,
            "ema_decay": 0.9999,
            "dense_fraction": 0.15,
            "dataloader_num_workers": 8,
            "checkpointing_steps": 5000,
            "checkpoints_total_limit": 3,
            "objective_config": json.dumps({"shift": 1.0 if self.resolution <= 256 else 3.0}),
        }


_PRX_PARTS = {
    "vae": ["black-forest-labs/FLUX.1-schnell", "vae"],
    "text_encoder": "google/t5gemma-2b-2b-ul2",
    "tokenizer": "google/t5gemma-2b-2b-ul2",
}
_SD3 = "stabilityai/stable-diffusion-3.5-medium"

# fmt: off
TEXT_RECIPES = {
    # name                 preset  pixels pipeline parts      batch  rate
    "prx-s-256": TextRecipe("prx-s", 256, None,    _PRX_PARTS, 512,  1e-4),
    "prx-s-512": TextRecipe("prx-s", 512, None,    _PRX_PARTS, 256,  1e-4),
    "sd3-s-256": TextRecipe("sd3-s", 256, _SD3,    {},         512,  1e-4),
    "sd3-s-512": TextRecipe("sd3-s", 512, _SD3,    {},         256,  1e-4),
}
# fmt: on


def text_recipe_settings(name: str) -> dict[str, Any]:
    """The values of a recipe for the fields of `TextTrainConfig`. Raises ValueError if there is no such recipe."""
    if name not in TEXT_RECIPES:
        raise ValueError(f"Expected a recipe among {list(TEXT_RECIPES)}, got {name!r}.")
    return {key: value for key, value in TEXT_RECIPES[name].settings().items() if value is not None}
