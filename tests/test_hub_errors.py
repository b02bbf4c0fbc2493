# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Whatever is loaded from the Hub says what to do where it cannot be reached, in one sentence."""

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from diffusers_tread.data import open_source
from diffusers_tread.data.latents.vae import load_vae
from diffusers_tread.hub_errors import ADVICE, LOST
from diffusers_tread.metrics import DatasetImages, load_dataset_prompts, load_feature_extractor, load_scorers
from diffusers_tread.objectives.terms.vision_encoder import VisionEncoder
from diffusers_tread.runs.latents import load_prompt_encoder
from diffusers_tread.runs.sampling import SamplingConfig, load_pipeline, load_text_pipeline
from diffusers_tread.text import load_pipeline as load_parts
from diffusers_tread.text import make_transformer


NAME, CPU = "nobody/has-this", torch.device("cpu")
TINY_SD3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
TINY_SD3 |= {"caption_projection_dim": 8}
OPENERS = {
    "data": lambda: open_source(f"hub:{NAME}", resolution=8),
    "streamed data": lambda: open_source(f"hub:{NAME}", resolution=8, streaming=True),
    "a VAE": lambda: load_vae(NAME),
    "a reference": lambda: DatasetImages(NAME, resolution=8),
    "prompts": lambda: load_dataset_prompts(NAME),
    "a network": lambda: load_feature_extractor(f"transformers:{NAME}"),
    "a scorer": lambda: load_scorers(["clip"], clip_model=NAME),
    "a teacher": lambda: VisionEncoder.from_pretrained(NAME),
    "a pipeline": lambda: load_pipeline(SamplingConfig(pretrained_pipeline=NAME), CPU),
    "a text-to-image pipeline": lambda: load_text_pipeline(SamplingConfig(pretrained_pipeline=NAME), CPU),
    "a pipeline to train": lambda: load_parts(NAME),
    "its parts": lambda: load_parts(NAME, transformer=make_transformer(TINY_SD3)),
    "text encoders": lambda: load_prompt_encoder(NAME),
}


@pytest.mark.parametrize("what", OPENERS)
def test_a_hub_that_cannot_be_reached_gives_one_sentence_with_what_to_do(what, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="^Expected ") as caught:
        OPENERS[what]()
    assert ADVICE in str(caught.value)


@pytest.mark.parametrize("kind", [ConnectionError, *HfHubHTTPError.__bases__])
def test_errors_of_every_client_count(kind, monkeypatch):
    def unreachable(*args, **options):
        raise kind("no route to the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert issubclass(kind, LOST)
    with pytest.raises(ValueError, match="no route to the Hub. If it is gated"):
        OPENERS["data"]()
