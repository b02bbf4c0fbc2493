# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Text-to-image pipelines and LoRAs as they are pushed: plain ones of diffusers, with a card."""

import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard


pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
from tiny_pipelines import PIPELINES  # noqa: E402

from diffusers_tread.hub import BackgroundPush, CardDetails, export_text_pipeline  # noqa: E402
from diffusers_tread.runs.lora import export_lora  # noqa: E402


@pytest.mark.parametrize("kind", ["sd3", "prx"])
def test_an_exported_pipeline_loads_and_its_card_says_what_it_is(tmp_path, kind):
    pipeline = PIPELINES[kind](tmp_path / "parts")
    training = {"proportion_empty_prompts": 0.1, "resolution": 64, "pretrained_model_name_or_path": "ant/base"}
    details = CardDetails(
        dataset="ant/photos",
        samples=PIL.Image.new("RGB", (8, 8)),
        training=training,
    )
    for _ in range(2):  # the second replaces the first
        export_text_pipeline(pipeline, tmp_path / "pushed", repo_id="ant/model", card=details)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pushed")
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(one, weights[name]) for name, one in loaded.transformer.state_dict().items())
    card = ModelCard.load(tmp_path / "pushed" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and card.data.datasets == ["ant/photos"]
    assert 'from_pretrained("ant/model")' in card.text and "captions dropped" in card.text
    assert 'pipe("a prompt", height=64, width=64)' in card.text
    assert card.data.base_model == "ant/base"
    assert not list((tmp_path / "pushed").rglob("*.py")) and (tmp_path / "pushed" / "samples.png").exists()


def test_a_pushed_lora_loads_in_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    PIPELINES["sd3"](tmp_path / "parts").save_pretrained(tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    push = BackgroundPush("ant/lora", tmp_path / "hub", export=export_lora)
    push._upload = lambda message: None  # what is sent is tested elsewhere
    push.start(pipeline, commit_message="Step 1")
    push.wait()
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert "lora" in card.data.tags and str(tmp_path) not in card.content
    plain = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain.load_lora_weights(tmp_path / "hub", weight_name="pytorch_lora_weights.safetensors")
    names = [name for name, _ in plain.transformer.named_parameters() if "lora" in name]
    assert names and len(names) == sum("lora" in name for name, _ in pipeline.transformer.named_parameters())
