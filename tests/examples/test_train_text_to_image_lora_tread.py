# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""examples/train_text_to_image_lora_tread.py on tiny pipelines with real tokenizers and text encoders, built small."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from runs import interrupting
from safetensors.torch import load_file


pytest.importorskip("peft")
pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
import train_text_to_image_lora_tread as example  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")


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


@pytest.fixture(scope="module", params=["flux", "sd3"])
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
    values = {"pretrained_model_name_or_path": base, "train_data_dir": photos, "output_dir": output, "resolution": 16}
    values |= {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "dense_fraction": 0.25}
    values |= {"rank": 2, "learning_rate": 1e-2}
    return [str(word) for name, value in (values | changes).items() for word in (f"--{name}", value)]


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red square", **settings, output_type="np", generator=generator).images[0]


def test_the_adapter_loads_in_the_plain_pipeline(base, photos, tmp_path):
    example.main(flags(base, photos, tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(base)
    plain = image(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert not any("forward" in module.__dict__ for module in pipeline.transformer.modules())
    assert np.abs(image(pipeline) - plain).max() > 1e-3


@pytest.mark.parametrize("full", [False, True])
def test_a_killed_run_resumes_bit_for_bit(base, photos, tmp_path, full):
    options = ["--full", "--gradient_checkpointing"] if full else []
    example.main(flags(base, photos, tmp_path / "whole") + options)
    batches = itertools.count(1)
    with interrupting(example, "make_batch", lambda *args: next(batches) == 4):
        example.main(flags(base, photos, tmp_path / "parts") + options)
    assert [path.name for path in tmp_path.glob("parts/checkpoint-*")] == ["checkpoint-2"]
    example.main(flags(base, photos, tmp_path / "parts") + options)

    name = "transformer/diffusion_pytorch_model.safetensors" if full else "pytorch_lora_weights.safetensors"
    whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_all_steps_but_the_dense_last_ones_are_routed(base, photos, tmp_path, monkeypatch):
    lengths = []
    forward = torch.nn.Linear.forward

    def recording_forward(layer, states):
        if states.ndim == 3:
            lengths[-1].add(states.shape[1])
        return forward(layer, states)

    make_batch = example.make_batch
    monkeypatch.setattr(example, "make_batch", lambda *a, **k: lengths.append(set()) or make_batch(*a, **k))
    monkeypatch.setattr(torch.nn.Linear, "forward", recording_forward)
    example.main(flags(base, photos, tmp_path, routes='[{"start": 2, "end": -4, "selection_ratio": 0.25}]'))
    # 16 image tokens, 12 of them kept; Flux's single blocks see 512 text tokens before them.
    assert all(12 in step and {12} <= step - lengths[3] <= {12, 524} for step in lengths[:3])
    assert 16 in lengths[3]


def test_a_folder_of_another_run_is_refused_until_it_may_be_overwritten(base, photos, tmp_path):
    example.main(flags(base, photos, tmp_path))
    other = flags(base, photos, tmp_path) + ["--learning_rate", "0.5"]
    with pytest.raises(ValueError, match="learning_rate: .* there, 0.5 now"):
        example.main(other)
    example.main(other + ["--overwrite_output_dir"])


def test_the_velocity_is_the_models_own_at_its_own_timestep(base):
    """Against a call of the transformer written out by hand."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    is_flux = isinstance(pipeline, FluxPipeline)
    latents, sigmas = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    prompts = ["a red square", "a blue square"]
    packed = example.pack(pipeline, latents)
    velocity = example.PipelineVelocity(pipeline, guidance_scale=1.0)
    with torch.no_grad():
        actual = velocity(prompts, packed, sigmas, 16)
        if is_flux:
            embeds, pooled, text_ids = pipeline.encode_prompt(prompts, None, max_sequence_length=512)
            patches = latents.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
            assert torch.equal(patches, packed)
            ids = torch.zeros(4, 4, 3)
            ids[..., 1], ids[..., 2] = torch.arange(4.0)[:, None], torch.arange(4.0)[None]
            expected = pipeline.transformer(
                patches, embeds, pooled, sigmas, ids.view(16, 3), text_ids, torch.ones(2)
            ).sample
        else:
            embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            expected = pipeline.transformer(latents, embeds, pooled, 1000 * sigmas).sample
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"caption_column": "caption"}, ValueError, r"Expected columns \['caption'\]"),
        ({"routes": '[{"start": 2, "end": 7}]'}, ValueError, "at least two blocks after the route"),
        ({"guidance_scale": 3.0}, ValueError, "guidance_embeds"),
        ({"dense_fraction": 1.5}, SystemExit, "2"),
        ({"dataset_name": "both"}, SystemExit, "2"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(base, photos, tmp_path, changes, error, message):
    if "guidance_scale" in changes and "flux" in str(base):
        pytest.skip("this model is guidance-distilled")
    with pytest.raises(error, match=message):
        example.main(flags(base, photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
