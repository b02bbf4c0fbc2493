# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What is not a number ends an evaluation with an error, wherever it comes from."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_evaluation import TinyExtractor, make_pipeline

from diffusers_tread.metrics import (
    METRICS,
    EvaluationResults,
    FeatureExtractor,
    FeatureStore,
    Metric,
    PipelineImages,
    evaluate_images,
    evaluate_pipeline,
    load_results,
    prepare_reference,
)


NAN, INF = float("nan"), float("inf")
RUN = {"num_samples": 6, "batch_size": 3, "num_inference_steps": 2}


@pytest.fixture
def reference(reference_folder, extractor, tmp_path):
    return prepare_reference(reference_folder, extractor=extractor, batch_size=10, store_dir=tmp_path / "reference")


@pytest.fixture
def evaluate(reference, extractor, tmp_path):
    def evaluate(pipeline):
        return evaluate_pipeline(
            pipeline, extractor=extractor, reference=reference, store_dir=tmp_path / "samples", **RUN
        )

    return evaluate


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["transformer_blocks.3.ff.net.2.weight", "class_embedding.weight", "proj_out.bias"])
def test_weights(evaluate, tmp_path, name, value):
    pipeline = make_pipeline()
    pipeline.transformer.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"Expected finite weights of the transformer, .*{name}"):
        evaluate(pipeline)
    assert not (tmp_path / "samples").exists()


def test_weights_of_the_extractor():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    network[1].bias.data[0] = NAN
    with pytest.raises(ValueError, match="Expected finite weights of n, .*1.bias"):
        FeatureExtractor(network, name="n", outputs=("features",), settings={})


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_samples_that_overflow(evaluate, tmp_path, scale):
    pipeline = make_pipeline()
    for parameter in pipeline.transformer.parameters():
        parameter.data *= scale
    pipeline.transformer.to(torch.float16 if scale < 1e5 else torch.float32)
    pipeline.transformer.class_embedding.weight.data.clamp_(-6e4, 6e4)
    with pytest.raises(ValueError, match="Expected finite (samples|weights)"):
        evaluate(pipeline)
    assert not list(tmp_path.glob("samples/*.safetensors"))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_pipeline_gives_no_images_of_samples_that_are_none(output_type, value):
    pipeline = make_pipeline()
    keywords = {"num_inference_steps": 2, "latents": torch.zeros(2, 3, 8, 8)}
    keywords["callback_on_step_end"] = lambda pipe, step, timestep, tensors: {"latents": spoil(tensors["latents"])}

    def spoil(latents):
        latents = latents.clone()
        latents[1, 0, 0, 0] = value
        return latents

    with pytest.raises(ValueError, match="Expected finite samples, got NaN or infinity in 1 of 2"):
        pipeline([1, 2], output_type=output_type, **keywords)
    assert not pipeline([1, 2], output_type="latent", **keywords).images.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("output", ["features", "spatial", "logits"])
def test_features_of_single_images(reference, tmp_path, output, value):
    class Spoiled(TinyExtractor):
        def extract(self, images):
            features = super().extract(images)
            features[output][-1, 0] = value
            return features

    images = PipelineImages(make_pipeline(), num_images=6, num_inference_steps=2)
    with pytest.raises(ValueError, match=rf"NaN or infinity in '{output}' of images \[2\]"):
        evaluate_images(images, extractor=Spoiled(), reference=reference, batch_size=3, store_dir=tmp_path / "samples")
    assert not list(tmp_path.glob("samples/*.safetensors"))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.tensor([[1.0, NAN], [0.0, 0.0]]), r"NaN or infinity in 'features' of images \[2\]"),
        (torch.tensor([[1.0, 1.0], [0.0, INF]]), r"NaN or infinity in 'features' of images \[3\]"),
        (torch.ones(3, 2), r"as float32 \[2, 2\], got torch.float32 \[3, 2\]"),
        (torch.ones(2, 5), r"as float32 \[2, 2\], got torch.float32 \[2, 5\]"),
        (torch.ones(2, 2, 1), "as float32"),
        (torch.tensor(1.0), "as float32"),
        (torch.ones(2, 2, dtype=torch.int64), "got torch.int64"),
        (torch.ones(2, 2, dtype=torch.float64), "got torch.float64"),
        (None, "Expected a whole file of features"),
    ],
)
def test_a_file_of_features_is_checked_when_it_is_read(tmp_path, features, message):
    store = FeatureStore(tmp_path / "store", num_images=4, batch_size=2, settings={})
    store.claim()
    for batch in range(2):
        store.write(batch, {"features": torch.rand(2, 2)})
    path = store.folder / "batch-000001.safetensors"
    safetensors.torch.save_file({"other": torch.ones(2, 2)} if features is None else {"features": features}, path)
    for read in (store.features, lambda name: store.statistics(name, extractor="n")):
        with pytest.raises(ValueError, match=message) as error:
            read("features")
        assert "batch-000001" in str(error.value)


GOOD = {"mu": np.zeros(6), "sigma": np.eye(6), "count": np.array(9)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.full(6, NAN)}, "finite statistics"),
        ({"sigma": np.diag([1.0] * 5 + [INF])}, "finite statistics"),
        ({"mu": np.zeros(6, dtype=complex)}, "mean in floating point, got complex128"),
        ({"mu": np.array(["0.5"] * 6)}, "mean in floating point, got <U3"),
        ({"sigma": np.eye(6, dtype=np.int64)}, "covariance in floating point, got int64"),
        ({"mu": np.array([None] * 6)}, "[Oo]bject"),
        ({"mu": np.zeros((1, 6))}, r"a mean \[D\]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"a mean \[D\]"),
        ({"sigma": np.zeros((6, 5))}, r"a covariance \[D, D\]"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "not symmetric"),
        ({"sigma": -np.eye(6)}, "negative variances"),
        *[({"count": np.array(count)}, "count as an integer") for count in (NAN, 0, -3, 2.5, "9", [9, 9])],
    ],
)
def test_statistics_of_a_file(extractor, tmp_path, change, message):
    arrays = GOOD | {"extractor": np.array(extractor.fingerprint)} | change
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        prepare_reference(tmp_path / "reference.npz", extractor=extractor, batch_size=2, store_dir=tmp_path)
    assert "reference.npz" in str(error.value)


@pytest.mark.parametrize("value", [NAN, INF, torch.tensor(1.0), None, True])
def test_values_of_metrics(evaluate, monkeypatch, value):
    metric = Metric(
        label="Odd",
        compute=lambda features: value,
        takes="features",
        output="features",
        higher_is_better=True,
        needs_reference=False,
    )
    monkeypatch.setitem(METRICS, "fid", metric)
    with pytest.raises(ValueError, match="Expected finite numbers as values of metrics, got .*fid"):
        evaluate(make_pipeline())


def test_results_of_a_file(tmp_path):
    results = EvaluationResults(
        metrics={"fid": 1.5}, num_samples=2, images={}, feature_extractor={}, reference={}, batch_size=1
    )
    content = results.to_dict()
    for value in (NAN, -INF, "1.5", None):
        (tmp_path / "results.json").write_text(json.dumps(content | {"metrics": {"fid": value}}))
        with pytest.raises(ValueError, match="Expected a results file .*finite numbers"):
            load_results(tmp_path / "results.json")
