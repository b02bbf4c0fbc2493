# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes text-to-image pipelines for the Hub. They are standard diffusers pipelines."""

import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from ..files import replace_folder
from ..installation import how_to_install
from ..markdown import as_code, as_text, table_row
from ..text import save_pipeline
from .model_card import SAMPLES, CardDetails, training_table


def export_text_pipeline(
    pipeline: DiffusionPipeline, folder: str | Path, *, repo_id: str | None = None, card: CardDetails | None = None
) -> Path:
    """Writes a pipeline that diffusers loads without this package, atomically.

    Args:
        pipeline: A text-to-image pipeline of diffusers.
        folder: A new folder, or one with a pipeline, which is replaced.
        repo_id: "organisation/name" for the card; None for the name of the folder.
        card: Details for the model card that the pipeline does not tell.

    Returns:
        The folder.
    """
    folder, card = Path(folder), card or CardDetails()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_pipeline(pipeline, temporary)
        text_model_card(pipeline, repo_id=repo_id or folder.resolve().name, details=card).save(temporary / "README.md")
        if card.samples is not None:
            card.samples.save(temporary / SAMPLES)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def text_model_card(pipeline: DiffusionPipeline, *, repo_id: str, details: CardDetails) -> ModelCard:
    """Writes the card of a text-to-image pipeline that was trained with routing."""
    # Metadata.
    is_on_hub = details.dataset is not None and details.dataset.count("/") == 1
    title = repo_id.rstrip("/").split("/")[-1]
    data = ModelCardData(
        license=details.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "diffusers-tread", "text-to-image", "tread", "token-routing"],
        datasets=[details.dataset] if is_on_hub else None,
        base_model=_base_model(details),
        model_name=title,
    )

    # Facts.
    size = (details.training or {}).get("resolution")  # may differ from the pipeline's default
    facts: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "transformer": type(pipeline.transformer).__name__,
        "parameters": f"{sum(one.numel() for one in pipeline.transformer.parameters()):,}",
        "trained on": details.dataset or "not stated",
        "sampler": type(pipeline.scheduler).__name__,
    }
    if details.step is not None:
        facts["state"] = f"{details.step} optimiser steps of a training that goes on"

    # Text.
    text = Template(files(__package__).joinpath("text_model_card.md").read_text(encoding="utf-8")).substitute(
        title=as_text(title),
        repo_id=as_code(repo_id),
        install=how_to_install(),
        samples=f"\n![Samples]({SAMPLES})\n" if details.samples is not None else "",
        options=f", height={size}, width={size}" if size else "",
        facts="\n".join(table_row(name, value) for name, value in facts.items()),
        training=training_table(details),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _base_model(details: CardDetails) -> str | None:
    """The public model whose transformer was trained further, and whose licence therefore still applies."""
    training = details.training or {}
    name = training.get("pretrained_model_name_or_path")
    is_new = training.get("preset") or training.get("transformer_config_name_or_path")
    return None if name is None or is_new or Path(name).exists() else name
