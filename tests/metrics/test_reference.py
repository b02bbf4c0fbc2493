# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import hashlib

import numpy as np
import pytest
from tiny_evaluation import TinyExtractor, pixels, write_images

from diffusers_tread.metrics import FolderImages, NpzImages, save_statistics


def test_statistics_saved_from_images_are_a_reference_with_the_same_distances(
    reference_folder, prepare, evaluate, tmp_path
):
    images = FolderImages(write_images(tmp_path / "images", pixels(6, 30)))
    of_images = prepare(reference_folder)
    save_statistics(tmp_path / "statistics.npz", of_images.statistics)
    saved = prepare(tmp_path / "statistics.npz", store_dir=tmp_path / "unused")
    assert saved.metrics == ("fid", "sfid", "inception_score") and not (tmp_path / "unused").exists()
    values = [evaluate(images, reference, metrics=("fid", "sfid")) for reference in (of_images, saved)]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match=r"images for \['precision'\]"):
        prepare(tmp_path / "statistics.npz", metrics=("fid", "precision"))
    with pytest.raises(ValueError, match="tiny:"):
        prepare(tmp_path / "statistics.npz", extractor=TinyExtractor(seed=3))


def test_a_file_with_statistics_and_images_gives_each_metric_what_it_is_for(extractor, prepare, evaluate, tmp_path):
    """As ADM's files have both: statistics of many images, and fewer images."""
    images = {"arr_0": pixels(5, 40), "mu": np.full(6, 100.0), "sigma": np.eye(6), "count": 50_000}
    np.savez(tmp_path / "reference.npz", **images, extractor=extractor.fingerprint)
    reference = prepare(tmp_path / "reference.npz")
    values = evaluate(NpzImages(tmp_path / "reference.npz"), reference, batch_size=40)
    assert values["fid"] > 6 * 90**2 and values["sfid"] == pytest.approx(0, abs=1e-6)
    assert values["precision"] == values["recall"] == 1.0
    digest = hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    assert reference.description == {"kind": "file", "name": "reference.npz", "sha256": digest}

    # Also where only the statistics are used, samples must have the images' size.
    with pytest.raises(ValueError, match=r"size \(16, 16\), got \(8, 8\)"):
        prepare(tmp_path / "reference.npz", metrics=("fid",), image_size=(16, 16))


def test_references_that_cannot_be_read_are_refused_by_name(reference_folder, prepare, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="in which there are none"):
        prepare(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere.npz"):
        prepare(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match=r"size \(16, 16\), got \(8, 8\)"):
        prepare(reference_folder, image_size=(16, 16))
    assert not (tmp_path / "stores").exists()

    damaged = write_images(tmp_path / "damaged", pixels(5, 20))
    (damaged / "000013.png").write_bytes((damaged / "000013.png").read_bytes()[:100])
    with pytest.raises(ValueError, match="000013.png"):
        prepare(damaged)
    mixed = write_images(tmp_path / "mixed", [*pixels(5, 16), *pixels(5, 4, height=9)])
    with pytest.raises(ValueError, match="one size"):
        prepare(mixed)
    prepare(FolderImages(mixed, resolution=6))
