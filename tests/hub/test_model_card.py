# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The card of a pipeline, as huggingface_hub reads it; its snippets run in test_push.py."""

import re
from pathlib import Path

import PIL.Image
import pytest
from huggingface_hub import ModelCard
from tiny_pipeline import make_pipeline

from diffusers_tread import EDMHeunScheduler, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.flops import forward_flops, guidance_flops
from diffusers_tread.hub import CardDetails, export_for_hub, model_card
from diffusers_tread.metrics import EvaluationResults, PipelineImages


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def results(pipeline):
    """Of an evaluation of the pipeline; the values are made up."""
    images = PipelineImages(pipeline, num_images=8, num_inference_steps=2, seed=7)
    return EvaluationResults(
        metrics={"fid": 12.25, "inception_score": 3.5, "inception_score_std": 0.5},
        num_samples=50_000,
        images={"name_or_path": "runs/one/pipeline", "revision": None} | images.description,
        feature_extractor={"name": "inception", "fingerprint": "abc"},
        reference={"kind": "file", "name": "VIRTUAL_imagenet256_labeled.npz", "sha256": "def"},
        batch_size=4,
    )


def rows(text):
    """The tables of a card, first column to the others."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {first: rest for first, *rest in cells}


def test_the_metadata_is_what_huggingface_hub_reads(pipeline, results, tmp_path):
    details = CardDetails(license="apache-2.0", dataset="ILSVRC/imagenet-1k", results=[results])
    folder = export_for_hub(pipeline, tmp_path / "tiny", repo_id="ant/tiny", card=details)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == "apache-2.0" and card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert card.data.model_name == "tiny" and {"diffusers-tread", "tread"} <= set(card.data.tags)

    found = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == results.metrics
    fid = found["fid"]
    assert fid.metric_name == "FID" and fid.dataset_name == "VIRTUAL_imagenet256_labeled.npz"
    assert fid.task_type == "unconditional-image-generation" and fid.dataset_type == "ILSVRC/imagenet-1k"
    assert fid.metric_args["scheduler"] == "EDMHeunScheduler" and fid.metric_args["seed"] == 7
    assert fid.metric_args["num_samples"] == 50_000 and fid.metric_args["num_inference_steps"] == 2
    assert fid.metric_args["guidance"]["kind"] == "SparseGuidance"
    assert fid.metric_args["guidance"]["weak_ratio"] == {"first": 0.8, "last": 0.4, "shape": "cosine"}


def test_the_text_tells_what_the_pipeline_is(pipeline, results):
    text = model_card(pipeline, repo_id="ant/tiny", details=CardDetails(results=[results])).text
    found, model = rows(text), pipeline.transformer
    assert text.startswith("\n# tiny\n") and 'TREADPipeline.from_pretrained("ant/tiny")' in text
    assert found["images"] == ["16x16 pixels, 5 classes"] and found["parameters"] == [f"{model.num_parameters():,}"]
    assert found["routes"] == ["blocks 2 to 2 of 6 (from 0, both included) without 50% of the tokens"]
    dense, routed = forward_flops(model, selection_ratio=0.0).total, forward_flops(model).total
    assert found["FLOPs per image and forward"] == [f"{dense:.3e} dense, {routed:.3e} routed; a multiply-add is two"]
    share = guidance_flops(model, pipeline.guider).share_of_cfg
    assert found["guidance"][0].endswith(f": {share:.0%} of the FLOPs of dense classifier-free guidance")
    assert found["FID"][:4] == ["12.25", "50,000", "VIRTUAL_imagenet256_labeled.npz", "inception"]
    assert found["Inception Score"][0] == "3.5" and "seed 7" in found["FID"][4]
    assert "such as 'ant'" in text and "Not stated" in text and "samples.png" not in text and "$" not in text


def test_a_model_without_routes_is_not_said_to_have_them():
    model = TREADTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, routes=None)
    card = model_card(TREADPipeline(model, EDMHeunScheduler()), repo_id="ant/dense")
    assert rows(card.text)["routes"] == ["none"] and "token routing" not in card.text.split("## Citation")[0]
    assert "tread" not in card.data.tags and card.data.eval_results is None and card.data.license is None


def test_settings_of_the_run_are_told_but_not_its_machine(pipeline, tmp_path):
    settings = {"objective": "edm", "max_train_steps": 400, "total_batch_size": 256, "ema_decay": 0.9999}
    settings |= {"train_data_dir": "/data/secret", "cache_dir": "/data/secret", "use_ema": True}
    settings |= {"lr_warmup_steps": None}
    details = CardDetails(training=settings, samples=PIL.Image.new("RGB", (4, 4)), dataset="my photos")
    folder = export_for_hub(pipeline, tmp_path / "tiny", card=details)
    card = ModelCard.load(folder / "README.md")
    found = rows(card.text)
    assert found["optimiser steps"] == ["400"] and found["images per step"] == ["256"]
    assert found["averaged weights"] == ["True"] and "warm-up steps" not in found
    assert "secret" not in card.content and found["trained on"] == ["my photos"] and card.data.datasets is None
    assert PIL.Image.open(folder / "samples.png").size == (4, 4) and "![Samples](samples.png)" in card.text


def test_results_of_other_weights_are_refused(pipeline, results, tmp_path):
    pipeline.transformer.proj_out.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="got those of runs/one/pipeline with other weights of transformer"):
        export_for_hub(pipeline, tmp_path / "tiny", card=CardDetails(results=[results]))
    pipeline = make_pipeline()
    pipeline.guidance_transformer = None
    with pytest.raises(ValueError, match="with a guidance_transformer. Evaluate this pipeline"):
        model_card(pipeline, repo_id="ant/tiny", details=CardDetails(results=[results]))
    assert not (tmp_path / "tiny").exists()


def test_the_citations_are_those_of_the_readme(pipeline):
    def citations(text):
        return re.search(r"```bibtex\n(.*?)```", text, flags=re.DOTALL)[1]

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert citations(model_card(pipeline, repo_id="ant/tiny").text) == citations(readme)
