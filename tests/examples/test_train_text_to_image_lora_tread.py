# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""examples/train_text_to_image_lora_tread.py on tiny pipelines with real tokenizers and text encoders, built small."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from runs import call, interrupting
from safetensors.torch import load_file


pytest.importorskip("peft")
pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
import train_text_to_image_lora_tread as example  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402

from diffusers_tread.hub import CardDetails  # noqa: E402
from diffusers_tread.runs.lora import add_lora, export_lora  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")
train = partial(call, example)
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def restored(fresh_accelerate):
    yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for index, color in enumerate(["red", "blue", "red"]):
        pixels = np.full((20, 24, 3), index * 60, dtype=np.uint8)
        pixels[..., 0 if color == "red" else 2] = 255
        PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a {color} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", params=["sd3"])
def base(request, tmp_path_factory):
    """The folder of a tiny pipeline with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    pipeline = PIPELINES[request.param](folder / "parts")
    with torch.no_grad():  # some gates start at zero
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def flags(base, photos, output, **changes):
    values = {"pretrained_model_name_or_path": base, "data": f"folder:{photos}", "output_dir": output}
    values |= {"resolution": 16, "routes": '[{"start": 2, "end": -4}]', "rank": 2, "learning_rate": 1e-2}
    values |= {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "dense_fraction": 0.25}
    return [str(word) for name, value in (values | changes).items() for word in (f"--{name}", value)]


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red square", **settings, output_type="np", generator=generator).images[0]


@pytest.mark.parametrize("base", ["sd3", "flux"], indirect=True)
def test_the_adapter_loads_in_the_plain_pipeline(base, photos, tmp_path):
    grid = {"validation_steps": 4, "validation_prompts": '["red"]', "num_validation_images": 1}
    train(*flags(base, photos, tmp_path, **grid, validation_inference_steps=1))
    assert (tmp_path / "samples" / "step-0000004.png").exists()
    pipeline = DiffusionPipeline.from_pretrained(base)
    plain = image(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=LORA.partition("/")[2])
    assert not any("forward" in module.__dict__ for module in pipeline.transformer.modules())
    assert np.abs(image(pipeline) - plain).max() > 1e-3


def test_a_killed_run_resumes_bit_for_bit_from_checkpoints_of_the_adapter_alone(base, photos, tmp_path):
    argv = ["--use_ema", "--gradient_checkpointing"]
    train(*flags(base, photos, tmp_path / "whole"), *argv)
    with interrupting(example.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 3):
        train(*flags(base, photos, tmp_path / "parts"), *argv)
    assert [path.name for path in tmp_path.glob("parts/checkpoint-*")] == ["checkpoint-2"]
    train(*flags(base, photos, tmp_path / "parts"), *argv)
    whole, parts = load_file(tmp_path / "whole" / LORA), load_file(tmp_path / "parts" / LORA)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    kept = load_file(tmp_path / "parts" / "checkpoint-2" / "trained_weights.safetensors")
    assert all("lora" in name for name in kept)
    assert not (tmp_path / "parts" / "checkpoint-2" / "model.safetensors").exists()


def test_all_steps_but_the_dense_last_ones_are_routed(base, photos, tmp_path, monkeypatch):
    lengths, forward, next_batch = [], torch.nn.Linear.forward, example.Trainer.next_batch

    def recording_forward(layer, states):
        if states.ndim == 3 and lengths:
            lengths[-1].add(states.shape[1])
        return forward(layer, states)

    def watch(trainer, micro_step):
        lengths.append(set())
        return next_batch(trainer, micro_step)

    monkeypatch.setattr(example.Trainer, "next_batch", watch)
    monkeypatch.setattr(torch.nn.Linear, "forward", recording_forward)
    train(*flags(base, photos, tmp_path, routes='[{"start": 2, "end": -4, "selection_ratio": 0.25}]'))
    # 16 image tokens, 12 of them kept; Flux's single blocks see 512 text tokens before them.
    assert all(12 in step and {12} <= step - lengths[3] <= {12, 524} for step in lengths[:3])
    assert 16 in lengths[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "--rank >= 1"),
        ({"preset": "sd3-s"}, "a LoRA is of a trained transformer"),
        ({"lora_target_modules": "nowhere"}, "nowhere"),
        ({"routes": '[{"start": 2, "end": 7}]'}, "at least two blocks after the route"),
        ({"call_options": '{"guidance_scale": 3.0}'}, "guidance_embeds"),
        ({"dense_fraction": 1.5}, r"--dense_fraction in \[0, 1\]"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(base, photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(*flags(base, photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_card_names_the_licence_and_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_tread.runs.lora.save_lora", lambda pipeline, folder: None)
    details = CardDetails(license="apache-2.0", dataset="ant/images")
    export_lora(SimpleNamespace(config={}), tmp_path, repo_id="ant/lora", card=details)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["ant/images"])
    assert "Licence: apache-2.0." in card.text
    export_lora(SimpleNamespace(config={}), tmp_path, repo_id="ant/lora")
    assert "Licence: not stated." in (tmp_path / "README.md").read_text()


def test_a_class_without_loras_is_refused():
    with pytest.raises(ValueError, match="that takes LoRAs, got Linear"):
        add_lora(SimpleNamespace(), SimpleNamespace(distributed_type="NO"), torch.nn.Linear(1, 1))
