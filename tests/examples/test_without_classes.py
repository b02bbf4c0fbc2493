# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A model without classes (num_classes=0) is trained, sampled, evaluated and exported."""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread import TREADPipeline
from diffusers_tread.hub import export_for_hub
from diffusers_tread.metrics import (
    PipelineImages,
    TorchFeatureExtractor,
    evaluate_pipeline,
    prepare_reference,
)


pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sample  # noqa: E402
import train_tread  # noqa: E402


MODEL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}
TRAIN = ["--train_batch_size=4", "--max_train_steps=2", "--num_classes=0", "--validation_steps=1"]
TRAIN += [
    "--num_validation_images=2",
    "--validation_inference_steps=2",
    f"--model_config_name_or_path={json.dumps(MODEL)}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a training on three classes of images makes, of which it does not look at."""
    from accelerate.state import AcceleratorState, GradientState

    top = tmp_path_factory.mktemp("run")
    for index in range(9):
        path = top / "images" / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.random.RandomState(index).randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    data = ["--data", f"folder:{top / 'images'}", "--resolution=8"]
    train_tread.main([*data, *TRAIN, "--output_dir", str(top / "out")])
    return top / "out" / "pipeline"


@pytest.fixture
def pipeline(folder):
    pipeline = TREADPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_training_makes_a_model_with_the_null_class_alone(folder, pipeline):
    assert pipeline.transformer.config.num_classes == 0 and not pipeline.config.id2label
    assert pipeline.transformer.class_embedding.weight.shape[0] == 1
    assert (folder.parent / "samples" / "step-0000001.png").exists()
    with pytest.raises(ValueError, match=r"class ids in \[0, 0\]"):
        pipeline([1], num_inference_steps=1)


@pytest.mark.parametrize("mode", ["images", "classes", "grid", "interpolation"])
def test_each_mode_of_sample_makes_its_sheet(folder, tmp_path, fresh_accelerate, mode):
    flags = {
        "images": ["--num_samples=3", "--random_labels"],
        "classes": ["--num_images_per_class=3", "--class_labels=0"],
        "grid": ["--guidance=sparse", "--guidance_scales=1.2,1.5", "--weak_ratios=0.7"],
        "interpolation": ["--num_seeds=2", "--num_frames=3"],
    }
    place = ["--pretrained_pipeline", str(folder), "--output_dir", str(tmp_path / "out")]
    sample.main([*place, "--mode", mode, "--num_inference_steps=2", *flags[mode]])
    assert len(list((tmp_path / "out" / "images").iterdir())) == (2 if mode == "grid" else 3)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.parametrize("random_labels", [False, True])
def test_all_samples_have_the_one_label(pipeline, random_labels):
    images = PipelineImages(pipeline, num_images=5, num_inference_steps=1, random_labels=random_labels)
    assert [images.label(index) for index in range(5)] == [0] * 5


def test_it_is_evaluated(pipeline, tmp_path, fresh_accelerate):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, stride=4), torch.nn.Flatten())
    extractor = TorchFeatureExtractor(network, name="n", size=8)
    options = {"extractor": extractor, "batch_size": 4}
    images = PipelineImages(pipeline, num_images=8, num_inference_steps=1, seed=1)
    reference = prepare_reference(images, **options, metrics=("fid",), store_dir=tmp_path / "reference")
    common = {"num_samples": 8, "num_inference_steps": 1, "guidance_scale": 2.0, "store_dir": tmp_path / "samples"}
    assert evaluate_pipeline(pipeline, reference=reference, **options, **common)["fid"] >= 0


def test_it_is_exported_and_its_card_says_so(pipeline, tmp_path):
    folder = export_for_hub(pipeline, tmp_path / "exported")
    text = (folder / "README.md").read_text()
    assert "An unconditional diffusion transformer" in text and "no classes" in text
    assert TREADPipeline.from_pretrained(folder).transformer.config.num_classes == 0
