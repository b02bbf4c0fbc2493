# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sources, stores and evaluations in one process; several processes and kills: tests/examples/test_evaluate.py."""

import hashlib
import json
import os
import resource

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread import EDMHeunScheduler, SparseGuidance, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.data import derive_seed
from diffusers_tread.metrics import (
    DatasetImages,
    EvaluationResults,
    FeatureExtractor,
    FeatureStatistics,
    FeatureStore,
    FolderImages,
    KeptImages,
    NpzImages,
    PipelineImages,
    evaluate_images,
    evaluate_pipeline,
    frechet_distance,
    inception_score,
    load_results,
    precision,
    prepare_reference,
    recall,
    save_statistics,
)


class TinyExtractor(FeatureExtractor):
    """Six features, eight spatial ones and logits of four classes, each by a random linear map of a tiny image."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        network = torch.nn.ModuleDict(
            {
                "features": torch.nn.Linear(48, 6),
                "spatial": torch.nn.Linear(48, 8),
                "logits": torch.nn.Linear(48, 4),
            }
        )
        super().__init__(network, name="tiny", outputs=tuple(network), settings={})

    def extract(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)
        return {name: layer(small) for name, layer in self.network.items()}


@pytest.fixture
def extractor():
    return TinyExtractor()


@pytest.fixture
def make_pipeline():
    def make(channels=3, **components):
        torch.manual_seed(1)
        transformer = TREADTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=6,
            in_channels=channels,
            sample_size=8,
            num_classes=5,
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        pipeline = TREADPipeline(transformer, EDMHeunScheduler(s_churn=5.0), **components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def pixels(seed, count, height=8, width=8):
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_images(folder, images):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture
def reference_folder(tmp_path):
    return write_images(tmp_path / "reference images", pixels(5, 40))


def test_a_folder_a_file_and_a_data_set_of_the_same_images_have_the_same_values(extractor, reference_folder, tmp_path):
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
    reference = prepare_reference(
        str(reference_folder), extractor=extractor, batch_size=16, store_dir=tmp_path, image_size=(8, 8)
    )
    assert reference.metrics == ("fid", "sfid", "inception_score", "precision", "recall")
    values = {
        name: evaluate_images(
            source,
            extractor=extractor,
            reference=reference,
            metrics=reference.metrics,
            batch_size=7,
            store_dir=tmp_path / name,
        )
        for name, source in sources.items()
    }
    assert values["folder"] == values["file"] == values["data set"]

    mine = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    theirs = extractor(torch.from_numpy(pixels(5, 40)).permute(0, 3, 1, 2))
    distances = {
        metric: frechet_distance(
            FeatureStatistics.from_features(mine[output]), FeatureStatistics.from_features(theirs[output])
        )
        for metric, output in (("fid", "features"), ("sfid", "spatial"))
    }
    neighbours = {compute.__name__: compute(mine["features"], theirs["features"]) for compute in (precision, recall)}
    score = inception_score(mine["logits"], num_splits=1)
    expected = distances | neighbours | {"inception_score": score.mean, "inception_score_std": score.std}
    assert values["folder"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_photo_on_its_side_is_upright_in_a_folder_and_in_a_data_set(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image = pixels(6, 1, height=8, width=8)[0]
    (tmp_path / "images" / "a class").mkdir(parents=True)
    PIL.Image.fromarray(image).save(tmp_path / "images" / "a class" / "photo.png", exif=exif)
    upright = torch.from_numpy(np.rot90(image, k=-1).copy()).permute(2, 0, 1)[None]
    data = DatasetImages(str(tmp_path / "images"), resolution=8, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(FolderImages(tmp_path / "images").read(0, 1), upright)
    assert torch.equal(data.read(0, 1), upright)


@pytest.mark.parametrize("kind", ["folder", "file", "data set"])
def test_other_images_under_the_same_name_have_another_description(kind, tmp_path):
    def describe():
        if kind == "folder":
            return FolderImages(tmp_path / "images").description
        if kind == "file":
            return NpzImages(tmp_path / "images.npz").description
        return DatasetImages(str(tmp_path / "images"), resolution=8, cache_dir=str(tmp_path / "cache")).description

    folder = write_images(tmp_path / "images", pixels(6, 3))
    np.savez(tmp_path / "images.npz", pixels(6, 3))
    before = describe()
    assert describe() == before
    PIL.Image.fromarray(pixels(7, 1)[0]).save(folder / "000001.png")
    os.utime(folder / "000001.png", (0, 0))  # `datasets` looks at the time, in seconds
    np.savez(tmp_path / "images.npz", pixels(7, 3))
    assert describe() != before


def test_images_against_themselves_have_no_distance_and_against_others_one(extractor, reference_folder, tmp_path):
    reference = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    common = {"extractor": extractor, "reference": reference, "metrics": ("fid", "precision", "recall")}
    same = evaluate_images(FolderImages(reference_folder), **common, batch_size=40, store_dir=tmp_path / "same")
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1.0
    dark = write_images(tmp_path / "dark", pixels(5, 40) // 4)
    assert evaluate_images(FolderImages(dark), **common, batch_size=40, store_dir=tmp_path / "other")["fid"] > 0.1


def test_statistics_saved_from_images_are_a_reference_with_the_same_distances(extractor, reference_folder, tmp_path):
    images = FolderImages(write_images(tmp_path / "images", pixels(6, 30)))
    of_images = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    save_statistics(tmp_path / "statistics.npz", of_images.statistics)
    saved = prepare_reference(
        tmp_path / "statistics.npz", extractor=extractor, batch_size=16, store_dir=tmp_path / "unused"
    )
    assert saved.metrics == ("fid", "sfid", "inception_score") and not (tmp_path / "unused").exists()
    values = [
        evaluate_images(
            images,
            extractor=extractor,
            reference=reference,
            metrics=("fid", "sfid"),
            batch_size=16,
            store_dir=tmp_path / "features",
        )
        for reference in (of_images, saved)
    ]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match=r"images for \['precision'\]"):
        prepare_reference(
            tmp_path / "statistics.npz",
            extractor=extractor,
            batch_size=16,
            store_dir=tmp_path,
            metrics=("fid", "precision"),
        )
    with pytest.raises(ValueError, match="tiny:"):
        prepare_reference(
            tmp_path / "statistics.npz", extractor=TinyExtractor(seed=3), batch_size=16, store_dir=tmp_path
        )


def test_a_file_with_statistics_and_images_gives_each_metric_what_it_is_for(extractor, tmp_path):
    """As ADM's files have both: statistics of many images, and fewer images."""
    images = {"arr_0": pixels(5, 40), "mu": np.full(6, 100.0), "sigma": np.eye(6), "count": 50_000}
    np.savez(tmp_path / "reference.npz", **images, extractor=extractor.fingerprint)
    reference = prepare_reference(tmp_path / "reference.npz", extractor=extractor, batch_size=16, store_dir=tmp_path)
    same = NpzImages(tmp_path / "reference.npz")
    values = evaluate_images(
        same,
        extractor=extractor,
        reference=reference,
        metrics=reference.metrics,
        batch_size=40,
        store_dir=tmp_path / "same",
    )
    assert values["fid"] > 6 * 90**2 and values["sfid"] == pytest.approx(0, abs=1e-6)
    assert values["precision"] == values["recall"] == 1.0
    digest = hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    assert reference.description == {"kind": "file", "name": "reference.npz", "sha256": digest}

    # Also where only the statistics are used, samples must have the images' size.
    with pytest.raises(ValueError, match=r"size \(16, 16\), got \(8, 8\)"):
        prepare_reference(
            tmp_path / "reference.npz",
            extractor=extractor,
            batch_size=16,
            store_dir=tmp_path,
            metrics=("fid",),
            image_size=(16, 16),
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pipeline_its_kept_images_and_its_pil_images_agree(
    channels, extractor, make_pipeline, reference_folder, tmp_path
):
    pipeline = make_pipeline(channels)
    source = PipelineImages(pipeline, num_images=12, num_inference_steps=3, seed=4)
    kept = KeptImages(source, folder=tmp_path / "kept", num_kept=50_000)
    reference = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    common = {"extractor": extractor, "reference": reference, "metrics": reference.metrics, "batch_size": 5}
    values = evaluate_images(kept, **common, store_dir=tmp_path / "features")
    assert values == evaluate_images(FolderImages(tmp_path / "kept"), **common, store_dir=tmp_path / "folder")
    assert values == evaluate_pipeline(
        pipeline,
        **common,
        num_samples=12,
        num_inference_steps=3,
        seed=4,
        store_dir=tmp_path / "pipeline",
    )

    # As a user of the pipeline gets them.
    assert [source.label(index) for index in range(6)] == [0, 1, 2, 3, 4, 0]
    generators = [torch.Generator().manual_seed(derive_seed(4, "evaluate", index)) for index in range(5, 10)]
    images = pipeline([0, 1, 2, 3, 4], num_inference_steps=3, generator=generators).images
    for index, image in enumerate(images, start=5):
        shown = np.asarray(PIL.Image.open(tmp_path / "kept" / f"{index:06d}.png"))
        assert np.array_equal(shown, np.asarray(image.convert("RGB")))


def test_a_sample_depends_on_the_seed_and_its_index_alone(make_pipeline):
    source = PipelineImages(make_pipeline(guider=SparseGuidance()), num_images=12, num_inference_steps=3)
    whole = source.read(0, 12)
    alone = torch.cat([source.read(index, index + 1) for index in range(12)])
    assert (whole.int() - alone.int()).abs().max() <= 1  # rounding depends on the batch
    other = PipelineImages(source.pipeline, num_images=12, num_inference_steps=3, seed=1)
    assert not torch.equal(other.read(0, 12), whole)


def test_random_labels_are_uniform_and_repeat(make_pipeline):
    pipeline = make_pipeline()
    source = PipelineImages(pipeline, num_images=5000, num_inference_steps=1, random_labels=True)
    labels = [source.label(index) for index in range(5000)]
    counts = np.bincount(labels, minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20  # chi-square of 4 degrees of freedom: p < 0.0005
    assert labels != [index % 5 for index in range(5000)]
    again = PipelineImages(pipeline, num_images=5000, num_inference_steps=1, random_labels=True)
    assert labels == [again.label(index) for index in range(5000)]


def test_a_store_goes_on_where_it_was_and_keeps_finished_batches(extractor, make_pipeline, reference_folder, tmp_path):
    reference = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    options = {"extractor": extractor, "reference": reference, "num_samples": 11, "batch_size": 4}
    options |= {"num_inference_steps": 2, "store_dir": tmp_path / "features"}
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
def test_features_of_other_samples_are_refused(change, message, extractor, make_pipeline, reference_folder, tmp_path):
    reference = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    options = {"extractor": extractor, "reference": reference, "num_samples": 4, "batch_size": 4}
    options |= {"num_inference_steps": 2, "store_dir": tmp_path / "features"}
    evaluate_pipeline(make_pipeline(), **options)
    with pytest.raises(ValueError, match=message):
        evaluate_pipeline(make_pipeline(), **(options | change))


def test_other_weights_or_another_extractor_are_refused(extractor, make_pipeline, reference_folder, tmp_path):
    reference = prepare_reference(reference_folder, extractor=extractor, batch_size=16, store_dir=tmp_path)
    options = {"reference": reference, "num_samples": 4, "batch_size": 4, "num_inference_steps": 1}
    options["store_dir"] = tmp_path / "features"
    pipeline = make_pipeline()
    evaluate_pipeline(pipeline, extractor=extractor, **options)
    with pytest.raises(ValueError, match="feature_extractor.fingerprint"):
        evaluate_pipeline(pipeline, extractor=TinyExtractor(seed=3), **options)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="images.weights.transformer"):
        evaluate_pipeline(pipeline, extractor=extractor, **options)


def test_bad_images_are_refused_by_name(extractor, make_pipeline, reference_folder, tmp_path):
    options = {"extractor": extractor, "batch_size": 16, "store_dir": tmp_path / "store"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="in which there are none"):
        prepare_reference(tmp_path / "empty", **options)
    with pytest.raises(ValueError, match="nowhere.npz"):
        prepare_reference(tmp_path / "nowhere.npz", **options)
    with pytest.raises(ValueError, match=r"size \(16, 16\), got \(8, 8\)"):
        prepare_reference(reference_folder, **options, image_size=(16, 16))
    assert not (tmp_path / "store").exists()

    with pytest.raises(ValueError, match="access to the data set .*nowhere"):
        DatasetImages(str(tmp_path / "nowhere"), resolution=8)
    with pytest.raises(ValueError, match="column 'photo'"):
        DatasetImages(str(reference_folder), resolution=8, image_column="photo", cache_dir=str(tmp_path / "cache"))

    damaged = write_images(tmp_path / "damaged", pixels(5, 20))
    (damaged / "000013.png").write_bytes((damaged / "000013.png").read_bytes()[:100])
    with pytest.raises(ValueError, match="000013.png"):
        prepare_reference(damaged, **options)
    mixed = write_images(tmp_path / "mixed", [*pixels(5, 16), *pixels(5, 4, height=9)])
    with pytest.raises(ValueError, match="one size"):
        prepare_reference(mixed, **options)
    prepare_reference(FolderImages(mixed, resolution=6), **options)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    store = FeatureStore(tmp_path / "store", num_images=3, batch_size=2, settings={"a": {"b": 1}})
    assert store.claim() == [0, 1]
    store.write(1, {"features": torch.ones(1, 2)})
    assert (store.claim(), store.num_done()) == ([0], 1)
    (tmp_path / "store" / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json"):
        store.claim()


def test_a_full_disk_leaves_whole_batches_only(tmp_path):
    store = FeatureStore(tmp_path / "store", num_images=2, batch_size=1, settings={})
    store.claim()
    store.write(0, {"features": torch.ones(1, 4)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(ValueError, match="run the same command again"):
            store.write(1, {"features": torch.ones(1, 4000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in store.folder.iterdir()) == ["batch-000000.safetensors", "settings.json"]
    assert store.claim() == [1]


def test_a_damaged_batch_is_named(tmp_path):
    store = FeatureStore(tmp_path / "store", num_images=2, batch_size=1, settings={})
    store.claim()
    for batch in range(2):
        store.write(batch, {"features": torch.ones(1, 4)})
    path = store.folder / "batch-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="batch-000001"):
        store.features("features")


def test_results_survive_their_file(tmp_path):
    results = EvaluationResults(
        metrics={"fid": 2.5},
        num_samples=50_000,
        images={"name_or_path": "org/model", "seed": 0},
        feature_extractor={"name": "inception", "fingerprint": "abc"},
        reference={"name": "VIRTUAL_imagenet256_labeled.npz", "sha256": "def"},
        batch_size=64,
    )
    assert results.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results.date.endswith("+00:00") and results.hardware["num_processes"] == 1
    results.save(tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results

    values = json.loads((tmp_path / "results.json").read_text())
    for broken in (values | {"format_version": 2}, values | {"score": 1}, {"metrics": {}}):
        (tmp_path / "results.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="results"):
            load_results(tmp_path / "results.json")
