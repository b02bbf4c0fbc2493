# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training of a LoRA: what it needs in addition to the training of a whole transformer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from ..hub import CardDetails
from ..markdown import as_text
from .text import TextOutputs
from .text_config import TextTrainConfig


LORA = "lora"
_TRAINED_WEIGHTS = "trained_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraTrainConfig(TextTrainConfig):
    """Settings for training a LoRA of a diffusers text-to-image transformer.

    Raises:
        ValueError: As for `TextTrainConfig`; the rank is below 1; the transformer is a new one, for which a LoRA makes
            no sense; the optimiser is Muon.
    """

    rank: int = 16
    """Rank of the LoRA."""
    lora_target_modules: str = "to_q,to_k,to_v,to_out.0"
    """Names of the linear layers that get a LoRA."""

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"Expected --rank >= 1, got {self.rank}.")
        if self.pretrained_model_name_or_path is None or self.transformer_values() is not None:
            raise ValueError("Expected --pretrained_model_name_or_path alone: a LoRA is of a trained transformer.")
        if self.optimizer == "muon":
            raise ValueError(
                "Expected --optimizer adamw for a LoRA, got 'muon': the matrix that it trains is the product of two."
            )


def add_lora(config: LoraTrainConfig, accelerator: Accelerator, transformer: torch.nn.Module) -> Any:
    """Freezes a transformer and adds a LoRA to it, in float32.

    Returns:
        The `LoraConfig`.

    Raises:
        ValueError: No layer has one of the names; diffusers has no LoRAs for this class of transformer; under FSDP,
            which cannot shard frozen and trained weights together.
    """
    from peft import LoraConfig

    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("Expected one process or DDP for a LoRA, got FSDP. The frozen weights stay whole.")
    if not hasattr(transformer, "add_adapter"):
        raise ValueError(f"Expected a transformer that takes LoRAs, got {type(transformer).__name__}, which does not.")
    targets = config.lora_target_modules.split(",")
    lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
    transformer.requires_grad_(False)
    transformer.add_adapter(lora)
    cast_training_params(transformer, dtype=torch.float32)
    return lora


def checkpoint_trained_weights_only(accelerator: Accelerator, transformer: torch.nn.Module) -> None:
    """Makes Accelerate's checkpoints hold only the trained weights instead of the whole model."""

    def trained() -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            content = {name: weight.detach().contiguous() for name, weight in trained().items()}
            save_file(content, Path(folder, _TRAINED_WEIGHTS))
        weights.clear()

    def load(models: list, folder: str) -> None:
        state = load_file(Path(folder, _TRAINED_WEIGHTS))
        if state.keys() != trained().keys():
            raise ValueError(f"Expected a checkpoint of the same LoRA, got another in {folder}.")
        transformer.load_state_dict(state, strict=False)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_lora(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Writes the LoRA of a pipeline's transformer in the format of `load_lora_weights`."""
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipeline.transformer)
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=layers)


def export_lora(
    pipeline: DiffusionPipeline, folder: str | Path, *, repo_id: str | None = None, card: CardDetails | None = None
) -> Path:
    """Writes the LoRA and a short model card; `export_text_pipeline` does the same for whole pipelines."""
    # The LoRA.
    folder, base, card = Path(folder), pipeline.config.get("_name_or_path"), card or CardDetails()
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(pipeline, folder)

    # Its card.
    is_public = base is not None and not Path(base).exists()
    is_on_hub = card.dataset is not None and card.dataset.count("/") == 1
    data = ModelCardData(
        license=card.license,
        datasets=[card.dataset] if is_on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "diffusers-tread", "lora", "text-to-image", "tread"],
        base_model=base if is_public else None,
    )
    about = "A LoRA that was trained with token routing ([TREAD](https://arxiv.org/abs/2501.04765)), for "
    about += f"`{base if is_public else type(pipeline).__name__}`: `pipe.load_lora_weights({repo_id!r})`."
    about += f"\n\nLicence: {'not stated' if card.license is None else as_text(card.license)}."
    about += " That of the base model holds as well."
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id or folder.name}\n\n{about}\n").save(folder / "README.md")
    return folder


class LoraOutputs(TextOutputs):
    """Outputs of a LoRA's training run: a folder `lora` instead of `pipeline`, see `RunOutputs`."""

    export, result = staticmethod(export_lora), LORA

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_lora(pipeline, folder)
