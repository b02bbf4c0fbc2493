# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Evaluations in one process; several processes and kills: tests/examples/test_evaluate_tread.py."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_evaluation import TinyExtractor, make_pipeline, pixels, write_images

from diffusers_tread.metrics import (
    DatasetImages,
    FeatureStatistics,
    FolderImages,
    KeptImages,
    NpzImages,
    PipelineImages,
    evaluate_pipeline,
    frechet_distance,
    inception_score,
    precision,
    recall,
)
from diffusers_tread.seeds import derive_seed


def test_a_folder_a_file_and_a_data_set_of_the_same_images_have_the_same_values(
    extractor, reference_folder, prepare, evaluate, tmp_path
):
    """And the values are those of the formulas on all features at once."""
    images = pixels(6, 30)
    folder = write_images(tmp_path / "images", images)
    np.savez(tmp_path / "images.npz", images)
    write_images(tmp_path / "labelled" / "all", images)

    sources = {
        "folder": FolderImages(folder),
        "file": NpzImages(tmp_path / "images.npz"),
        "data set": DatasetImages(str(tmp_path / "labelled"), resolution=8, cache_dir=str(tmp_path / "cache")),
    }
    reference = prepare(str(reference_folder), image_size=(8, 8))
    assert reference.metrics == ("fid", "sfid", "inception_score", "precision", "recall")
    values = {name: evaluate(source, reference, name, batch_size=7) for name, source in sources.items()}
    assert values["folder"] == values["file"] == values["data set"]

    mine, theirs = (extractor(torch.from_numpy(one).permute(0, 3, 1, 2)) for one in (images, pixels(5, 40)))
    distances = {
        metric: frechet_distance(*(FeatureStatistics.from_features(features[output]) for features in (mine, theirs)))
        for metric, output in (("fid", "features"), ("sfid", "spatial"))
    }
    neighbours = {compute.__name__: compute(mine["features"], theirs["features"]) for compute in (precision, recall)}
    score = inception_score(mine["logits"], num_splits=1)
    expected = distances | neighbours | {"inception_score": score.mean, "inception_score_std": score.std}
    assert values["folder"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_images_against_themselves_have_no_distance_and_against_others_one(
    reference_folder, prepare, evaluate, tmp_path
):
    reference, metrics = prepare(reference_folder), ("fid", "precision", "recall")
    same = evaluate(FolderImages(reference_folder), reference, "same", metrics=metrics, batch_size=40)
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1.0
    dark = write_images(tmp_path / "dark", pixels(5, 40) // 4)
    assert evaluate(FolderImages(dark), reference, metrics=metrics)["fid"] > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pipeline_its_kept_images_and_its_pil_images_agree(
    channels, extractor, reference_folder, prepare, evaluate, tmp_path
):
    pipeline, reference = make_pipeline(channels), prepare(reference_folder)
    source = PipelineImages(pipeline, num_images=12, num_inference_steps=3, seed=4)
    kept = KeptImages(source, folder=tmp_path / "kept", num_kept=50_000)
    values = evaluate(kept, reference, batch_size=5)
    assert values == evaluate(FolderImages(tmp_path / "kept"), reference, "folder", batch_size=5)
    common = {"extractor": extractor, "reference": reference, "metrics": reference.metrics, "batch_size": 5}
    common |= {"num_samples": 12, "num_inference_steps": 3, "seed": 4}
    assert values == evaluate_pipeline(pipeline, **common, store_dir=tmp_path / "pipeline")

    # As a user of the pipeline gets them.
    assert [source.label(index) for index in range(6)] == [0, 1, 2, 3, 4, 0]
    generators = [torch.Generator().manual_seed(derive_seed(4, "evaluate", index)) for index in range(5, 10)]
    images = pipeline([0, 1, 2, 3, 4], num_inference_steps=3, generator=generators).images
    for index, image in enumerate(images, start=5):
        shown = np.asarray(PIL.Image.open(tmp_path / "kept" / f"{index:06d}.png"))
        assert np.array_equal(shown, np.asarray(image.convert("RGB")))


@pytest.fixture
def options(extractor, prepare, reference_folder, tmp_path):
    """Of an `evaluate_pipeline` of one batch."""
    options = {"extractor": extractor, "reference": prepare(reference_folder), "store_dir": tmp_path / "features"}
    return options | {"num_samples": 4, "batch_size": 4, "num_inference_steps": 2}


def test_a_store_goes_on_where_it_was_and_keeps_finished_batches(options, tmp_path):
    options["num_samples"] = 11
    values = evaluate_pipeline(make_pipeline(), **options)
    files = sorted((tmp_path / "features").glob("batch-*"))
    assert [file.name for file in files] == [f"batch-{batch:06d}.safetensors" for batch in range(3)]

    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[1].unlink()
    assert evaluate_pipeline(make_pipeline(), **options) == values
    assert all(file.read_bytes() == content for file, (content, _) in before.items())
    assert [file.stat().st_mtime_ns == time for file, (_, time) in before.items()] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, "images.num_inference_steps: 2 there, 3 now"),
        ({"seed": 1}, "images.seed: 0 there, 1 now"),
        ({"batch_size": 5}, "batch_size: 4 there, 5 now"),
        ({"guidance_scale": 2.0}, "images.guidance.guidance_scale: 1.0 there, 2.0 now"),
    ],
)
def test_features_of_other_samples_are_refused(change, message, options):
    evaluate_pipeline(make_pipeline(), **options)
    with pytest.raises(ValueError, match=message):
        evaluate_pipeline(make_pipeline(), **(options | change))


def test_other_weights_or_another_extractor_are_refused(options):
    pipeline = make_pipeline()
    evaluate_pipeline(pipeline, **options)
    with pytest.raises(ValueError, match="feature_extractor.fingerprint"):
        evaluate_pipeline(pipeline, **options | {"extractor": TinyExtractor(seed=3)})
    with torch.no_grad():
        next(pipeline.transformer.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="images.weights.transformer"):
        evaluate_pipeline(pipeline, **options)
