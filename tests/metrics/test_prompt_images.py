# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples of diffusers' own text-to-image pipelines, and the files that prompts come from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))

from tiny_pipelines import PIPELINES  # noqa: E402

from diffusers_tread import SparseGuidance  # noqa: E402
from diffusers_tread.metrics import PromptImages, load_dataset_prompts, read_prompts  # noqa: E402
from diffusers_tread.metrics.pipeline_images import pipeline_networks, sample_generator  # noqa: E402


PROMPTS = ["a red square", "blue", "a blue red square"]
SIZE = {"height": 16, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def pipeline(request, tmp_path_factory):
    """In training mode but for the VAE."""
    torch.manual_seed(0)
    pipeline = PIPELINES[request.param](tmp_path_factory.mktemp(request.param))
    pipeline.set_progress_bar_config(disable=True)
    for network in pipeline_networks(pipeline).values():
        network.train()
    pipeline.vae.eval()
    return pipeline


def test_a_sample_depends_on_prompt_seed_and_index_alone(pipeline):
    """Also with networks in training mode, whose text encoders would drop values, and which are left in it."""
    source = PromptImages(pipeline, PROMPTS, num_images=5, guidance_scale=2.0, seed=3, **SIZE)
    whole = source.read(0, 5)
    torch.manual_seed(7)
    alone = torch.cat([source.read(index, index + 1) for index in range(5)])
    assert whole.shape == (5, 3, 16, 32) and whole.dtype == torch.uint8
    assert (whole.int() - alone.int()).abs().max() <= 1  # rounding depends on the batch
    assert pipeline.transformer.training and pipeline.text_encoder_2.training and not pipeline.vae.training
    assert [source.prompt(index) for index in range(5)] == [*PROMPTS, *PROMPTS[:2]]

    other = PromptImages(pipeline, PROMPTS, seed=4, guidance_scale=2.0, **SIZE)
    assert len(other) == 3 and not torch.equal(other.read(0, 3), whole[:3])
    assert not torch.equal(whole[0], whole[3])  # the same prompt, another index
    swapped = PromptImages(pipeline, ["blue", *PROMPTS[1:]], seed=3, guidance_scale=2.0, **SIZE)
    assert not torch.equal(swapped.read(0, 1), whole[:1]) and torch.equal(swapped.read(0, 5)[1], whole[1])


def test_samples_are_the_pipeline_s_own_pictures(pipeline):
    for network in pipeline_networks(pipeline).values():
        network.eval()
    source = PromptImages(pipeline, PROMPTS, call_options={"max_sequence_length": 4}, **SIZE)
    generators = [sample_generator(0, index) for index in range(2)]
    pictures = pipeline(prompt=PROMPTS[:2], generator=generators, max_sequence_length=4, **SIZE).images
    expected = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(source.read(0, 2).permute(0, 2, 3, 1).numpy(), expected)


def test_the_description_tells_apart_what_changes_samples(pipeline):
    def describe(prompts=PROMPTS, **options):
        return PromptImages(pipeline, prompts, **SIZE | options).description

    first = describe()
    assert json.loads(json.dumps(first)) == describe() and set(first["weights"]) >= {"transformer", "text_encoder"}
    assert describe(num_images=2) == first  # the first samples of the same
    changes = [{"prompts": PROMPTS[::-1]}, {"height": 32}, {"guidance_scale": 2.0}, {"seed": 1}]
    changes += [{"num_inference_steps": 3}, {"call_options": {"max_sequence_length": 4}}]
    descriptions = [json.dumps(describe(**change)) for change in changes]
    assert len({json.dumps(first), *descriptions}) == 7


def test_a_pipeline_that_is_held_with_a_guider_is_called_and_described(pipeline):
    class Guided:
        guider = SparseGuidance(guidance_scale=1.5)
        guidance_transformer = torch.nn.Linear(1, 1)

        def __init__(self, pipeline):
            self.pipeline, self.calls = pipeline, 0

        def __call__(self, **arguments):
            self.calls += 1
            return self.pipeline(**arguments)

    guided, alone = Guided(pipeline), PromptImages(pipeline, PROMPTS, **SIZE)
    source = PromptImages(guided, PROMPTS, **SIZE)
    assert torch.equal(source.read(0, 3), alone.read(0, 3)) and guided.calls == 1
    added = {name: source.description[name] for name in set(source.description) - set(alone.description)}
    assert added["guider"]["guidance_scale"] == 1.5 and set(added["guidance_weights"]) == {"guidance_transformer"}


def test_what_cannot_be_sampled_is_refused(pipeline):
    for prompts, message in ([], "at least one prompt"), (["a", " ", None], r"rows \[1, 2\]"):
        with pytest.raises(ValueError, match=message):
            PromptImages(pipeline, prompts)
    for options in {"negative_promt": ""}, {"generator": None}, {"num_images_per_prompt": 2}:
        with pytest.raises(ValueError, match=f"got \\['{next(iter(options))}'\\]"):
            PromptImages(pipeline, PROMPTS, call_options=options)
    weight = pipeline.transformer.proj_out.weight.data[0]
    kept = weight.clone()
    weight[0] = torch.nan
    try:
        with pytest.raises(ValueError, match="weights of the transformer"):
            PromptImages(pipeline, PROMPTS)
    finally:
        weight.copy_(kept)


def test_prompts_are_read_from_every_kind_of_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    prompts = ["two dogs, one cat", 'größer "quoted"', "two dogs, one cat"]
    (tmp_path / "a.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    lines = [json.dumps({"id": index, "caption": prompt}) for index, prompt in enumerate(prompts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        'id,caption\n0,"two dogs, one cat"\n1,"größer ""quoted"""\n2,"two dogs, one cat"\n'
    )
    rows = [{"caption": prompt} for prompt in prompts]
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "csv", "parquet"):
        assert read_prompts(tmp_path / f"a.{kind}", caption_column="caption") == prompts
    (tmp_path / "data").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "data" / "train.parquet")
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert load_dataset_prompts(str(tmp_path / "data"), caption_column="caption", **cache) == prompts
    with pytest.raises(ValueError, match=r"\['caption'\], got 'text'"):
        load_dataset_prompts(str(tmp_path / "data"), **cache)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\n  \nfour", r"rows \[1, 2\]"),
        ("a.txt", "", "at least one prompt"),
        ("a.csv", "id,text\n1,one\n2,\n", r"rows \[1\]"),
        ("a.csv", "id,caption\n1,one\n", r"\['id', 'caption'\], got 'text'"),
        ("a.jsonl", '{"text": "one"}\n{"text": 2}', r"rows \[1\]"),
        ("a.jsonl", '{"text": "one"', "whole .jsonl"),
        ("a.jsonl", '["one"]', "no JSON object"),
        ("a.parquet", "no table", "whole .parquet"),
        ("a.json", "{}", "Expected a file of"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_pixels_of_a_prx_without_vae_are_those_of_its_latents(tmp_path):
    """Which lie in [-1, 1], where other pipelines give [0, 1]."""
    pipeline = PIPELINES["prx"](tmp_path)
    transformer = type(pipeline.transformer).from_config({**pipeline.transformer.config, "in_channels": 3})
    pipeline = type(pipeline)(**{**pipeline.components, "transformer": transformer, "vae": None})
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 2.0}  # of images of an eighth
    options = {"use_resolution_binning": False}
    images = PromptImages(pipeline, PROMPTS, call_options=options, **size).read(0, 2)

    def sample(prompts, first):
        generators = [sample_generator(0, first + index) for index in range(len(prompts))]
        settings = size | options | {"output_type": "latent"}
        return pipeline(prompt=prompts, generator=generators, **settings).images

    expected = torch.cat([((sample([PROMPTS[index]], index).clamp(-1, 1) + 1) * 127.5).round() for index in range(2)])
    assert images.shape == (2, 3, 16, 16) and (images - expected).abs().max() <= 1
    assert 0 < (images == 0).float().mean() < 0.5  # some pixels are dark, and clipped
    with pytest.raises(RuntimeError, match="size of tensor"):  # or `_timesteps_repeated` is no longer needed
        sample(PROMPTS[:2], 0)
