# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a metric says of itself is all that evaluation, results and the script know of it."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_evaluation import pixels, write_images

from diffusers_tread.metrics import (
    METRICS,
    EvaluationResults,
    FeatureExtractor,
    FolderImages,
    MeanStd,
    Metric,
    check_metrics,
    load_reference,
    possible_metrics,
    register_metric,
    save_statistics,
)


ROOT = Path(__file__).parents[2]


class PixelExtractor(FeatureExtractor):
    """The mean of each channel, and all pixels, in 0..1."""

    def __init__(self):
        super().__init__(torch.nn.Identity(), name="pixels", outputs=("features", "pixels"), settings={})

    def extract(self, images):
        return {"features": images.float().mean(dim=(2, 3)) / 255, "pixels": images.float().flatten(1) / 255}


@pytest.fixture
def extractor():
    return PixelExtractor()


@pytest.fixture
def register():
    """`register_metric` until the test ends."""

    def register(name, **description):
        register_metric(name, Metric(**{"label": name, "output": "features", "higher_is_better": False} | description))
        names.append(name)

    names = []
    yield register
    for name in names:
        del METRICS[name]


@pytest.fixture
def folders(tmp_path):
    """Two folders of twenty images."""
    names = ("images", "reference")
    return [write_images(tmp_path / name, pixels(seed, 20)) for seed, name in enumerate(names)]


def pixels_of(folder):
    images = [np.asarray(PIL.Image.open(path)) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(images)).double() / 255  # N H W 3


def feature_mean_distance(samples, reference):
    return (samples.mean - reference.mean).norm().item()


def test_a_metric_of_statistics_is_one_function_and_one_call(register, folders, prepare, evaluate, tmp_path):
    register("feature_mean_distance", compute=feature_mean_distance, takes="statistics")
    reference = prepare(folders[1])
    assert reference.metrics == ("fid", "precision", "recall", "feature_mean_distance")
    values = evaluate(FolderImages(folders[0]), reference)
    means = [pixels_of(folder).mean(dim=(0, 1, 2)) for folder in folders]
    assert values["feature_mean_distance"] == pytest.approx((means[0] - means[1]).norm().item(), rel=1e-5)

    # A file with statistics serves it as well.
    save_statistics(tmp_path / "statistics.npz", reference.statistics)
    saved = prepare(tmp_path / "statistics.npz")
    assert saved.metrics == ("fid", "feature_mean_distance")
    again = evaluate(FolderImages(folders[0]), saved)
    assert again["feature_mean_distance"] == values["feature_mean_distance"]


def test_a_metric_of_all_features_needs_images_and_sees_them_in_order(register, folders, prepare, evaluate, tmp_path):
    seen = []
    register("recorder", compute=lambda *sides: seen.extend(sides) or 0.5, takes="features", output="pixels")
    assert evaluate(FolderImages(folders[0]), prepare(folders[1], metrics=("recorder",))) == {"recorder": 0.5}
    for features, folder in zip(seen, folders, strict=True):
        expected = pixels_of(folder).permute(0, 3, 1, 2).flatten(1).float()
        torch.testing.assert_close(features, expected)

    save_statistics(tmp_path / "statistics.npz", prepare(folders[1], metrics=("fid",)).statistics)
    with pytest.raises(ValueError, match=r"images for \['recorder'\]"):
        prepare(tmp_path / "statistics.npz", metrics=("recorder",))


def test_a_metric_of_parts_without_a_reference_has_a_mean_and_a_deviation(register, folders, prepare, evaluate):
    def brightness(pixels):
        means = torch.stack([part.mean() for part in pixels.chunk(2)])
        return MeanStd(mean=means.mean().item(), std=means.std(correction=0).item())

    register("brightness", compute=brightness, takes="features", needs_reference=False, label="Brightness")
    values = evaluate(FolderImages(folders[0]), prepare(folders[1], metrics=("fid",)), metrics=("brightness",))
    halves = pixels_of(folders[0]).flatten(1).mean(dim=1).reshape(2, 10).mean(dim=1)
    expected = {"brightness": halves.mean().item(), "brightness_std": (halves[0] - halves[1]).abs().item() / 2}
    assert values == pytest.approx(expected, abs=1e-6)

    results = EvaluationResults(
        metrics=values, num_samples=20, images={}, feature_extractor={}, reference={}, batch_size=8
    )
    assert results.label("brightness") == "Brightness"
    assert results.label("brightness_std") == "Brightness, standard deviation"
    assert results.label("unknown_std") == "unknown_std"


def test_statistics_of_an_output_of_one_s_own_have_its_name_in_the_file(
    register, extractor, folders, prepare, tmp_path
):
    register("pixel_mean_distance", compute=feature_mean_distance, takes="statistics", output="pixels")
    reference = prepare(folders[1], metrics=("pixel_mean_distance",))
    save_statistics(tmp_path / "statistics.npz", reference.statistics)
    with np.load(tmp_path / "statistics.npz") as file:
        assert set(file) == {"mu_pixels", "sigma_pixels", "count", "extractor"}
    again = load_reference(tmp_path / "statistics.npz", extractor=extractor).statistics
    assert torch.equal(again["pixels"].mean, reference.statistics["pixels"].mean)


@pytest.mark.parametrize(
    ("metrics", "num_samples", "message"),
    [
        (("fdi",), None, "among .*'fid'.*, got 'fdi'"),
        (("fid",), 1, "at least 2 images for fid, got 1"),
        (("fid", "precision"), 3, "at least 4 images for precision, got 3"),
        (("sfid",), None, "output 'spatial' for sfid, got pixels"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused_by_name(extractor, metrics, num_samples, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(metrics, extractor, num_samples=num_samples)
    assert possible_metrics(extractor) == ("fid", "precision", "recall")


def test_metrics_that_this_reference_does_not_allow_are_refused(register, folders, prepare, evaluate):
    register("picky", compute=feature_mean_distance, takes="statistics", min_samples=21)
    with pytest.raises(ValueError, match="at least 21 images for picky, got 20"):
        prepare(folders[1])
    with pytest.raises(ValueError, match=r"prepared for, \['fid'\], got \['recall'\]"):
        evaluate(FolderImages(folders[0]), prepare(folders[1], metrics=("fid",)), metrics=("fid", "recall"))


def test_a_name_is_given_once(register):
    with pytest.raises(ValueError, match="new name .* got 'fid'"):
        register("fid", compute=feature_mean_distance, takes="statistics")


def test_evaluation_cards_and_the_script_name_no_metric():
    package = ROOT / "src" / "diffusers_tread"
    script = ROOT / "examples" / "evaluate_tread.py"
    files = [*(package / "metrics").rglob("*.py"), *(package / "hub").rglob("*.py"), script]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(files)
        for name in METRICS
        if path.name not in ("registry.py", "__init__.py")  # which exports functions of such names
        and re.search(rf"[\"']{name}[\"']", path.read_text(encoding="utf-8"))
    ]
    assert found == []
