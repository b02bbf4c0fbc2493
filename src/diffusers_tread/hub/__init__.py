# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sharing a model on the Hub: exports, model cards, uploads."""

from .background import BackgroundPush
from .export import export_for_hub, push_pipeline
from .hub_pipeline import HubPipeline
from .model_card import CardDetails, model_card
from .model_index import check_model_index
from .text_export import export_text_pipeline
from .upload import open_repo, upload_folder


__all__ = [
    "BackgroundPush",
    "CardDetails",
    "HubPipeline",
    "check_model_index",
    "export_for_hub",
    "export_text_pipeline",
    "model_card",
    "open_repo",
    "push_pipeline",
    "upload_folder",
]
