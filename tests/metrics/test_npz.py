# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import hashlib
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_tread.metrics import FeatureExtractor, FeatureStatistics, NpzImages, load_reference, save_statistics


def make_extractor(name="inception", outputs=("features", "spatial")):
    """Knows its name and outputs; nothing here runs it."""
    return FeatureExtractor(nn.Linear(2, 2), name=name, outputs=outputs, settings={})


def make_statistics(dim, extractor=None, seed=0):
    features = torch.randn(9, dim, generator=torch.Generator().manual_seed(seed))
    return FeatureStatistics.from_features(features, extractor=extractor)


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).randint(0, 256, (7, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_piece_by_piece_in_any_order(tmp_path, images, save):
    save(tmp_path / "images.npz", images)
    reader = NpzImages(tmp_path / "images.npz")
    assert (len(reader), reader.height, reader.width) == (7, 4, 5)
    for start, stop in ((0, 2), (5, 7), (3, 4), (0, 7), (6, 99)):
        assert torch.equal(reader.read(start, stop), torch.from_numpy(images[start:stop]).permute(0, 3, 1, 2))


def test_adm_s_file_gives_statistics_and_images(tmp_path, images, caplog):
    rng = np.random.RandomState(0)
    arrays = {"mu": rng.rand(2048), "mu_s": rng.rand(2023), "sigma": np.eye(2048), "sigma_s": np.eye(2023)}
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, images, **arrays)

    reference = load_reference(path, extractor=make_extractor())
    assert set(reference.statistics) == {"features", "spatial"}
    for output, suffix in (("features", ""), ("spatial", "_s")):
        statistics = reference.statistics[output]
        np.testing.assert_array_equal(statistics.mean, arrays[f"mu{suffix}"])
        np.testing.assert_array_equal(statistics.covariance, arrays[f"sigma{suffix}"])
        assert statistics.mean.dtype == torch.float64
        assert statistics.count is None and statistics.extractor is None
    assert "does not say what made its features" in caplog.text
    assert len(reference.images) == 7
    assert reference.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    # Saved again they still do not say what made them.
    save_statistics(tmp_path / "again.npz", reference.statistics)
    again = load_reference(tmp_path / "again.npz", extractor=make_extractor()).statistics["spatial"]
    assert torch.equal(again.mean, reference.statistics["spatial"].mean)
    assert again.count is None and again.extractor is None

    # An extractor without spatial features takes what it can use.
    clean_fid = make_extractor("clean-fid:clean", ("features",))
    assert set(load_reference(path, extractor=clean_fid).statistics) == {"features"}
    with pytest.raises(ValueError, match="2048 features of which the file does not say what made them"):
        load_reference(path, extractor=make_extractor("transformers:dinov2", ("features",)))


def test_adm_s_files_of_images_alone_give_images(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    reference = load_reference(tmp_path / "images.npz", extractor=make_extractor("own"))
    assert reference.statistics == {} and len(reference.images) == 7


def test_saved_statistics_come_back_bit_for_bit(tmp_path):
    extractor = make_extractor("own")
    dims = {"features": 6, "spatial": 4}
    saved = {output: make_statistics(dim, extractor.fingerprint, seed=dim) for output, dim in dims.items()}
    save_statistics(tmp_path / "statistics.npz", saved)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]
    reference = load_reference(tmp_path / "statistics.npz", extractor=extractor)
    assert reference.images is None and set(reference.statistics) == set(saved)
    for output, statistics in reference.statistics.items():
        assert torch.equal(statistics.mean, saved[output].mean)
        assert torch.equal(statistics.covariance, saved[output].covariance)
        assert (statistics.count, statistics.extractor) == (9, extractor.fingerprint)
    reference.statistics["features"].update(torch.randn(3, 6))  # and can be added to
    assert reference.statistics["features"].count == 12


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "statistics.npz"
    save_statistics(path, {"features": make_statistics(3, "own:1")})
    before = path.read_bytes()

    def disk_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_statistics(path, {"features": make_statistics(3, "own:2")})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_statistics_of_another_extractor_are_refused(tmp_path):
    save_statistics(tmp_path / "statistics.npz", {"features": make_statistics(6, "inception:0123")})
    with pytest.raises(ValueError, match="Expected statistics made with own:.*, got some made with inception:0123"):
        load_reference(tmp_path / "statistics.npz", extractor=make_extractor("own"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, r"Expected mu and sigma, or images as arr_0, in .*got \['images'\]"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, r"Expected a mean \[D\] and a covariance \[D, D\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "Expected finite statistics"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "got 64 features of which the file does not say"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "allow_pickle=False"),
        ({"arr_0": np.array([None])}, "Expected arr_0 of .* as uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"Expected arr_0 of .* as uint8 \[N, H, W, 3\] in C order, got float64"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"got uint8 \(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8, order="F")}, "as uint8 .* in C order"),
    ],
)
def test_files_of_another_content_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path / "file.npz", extractor=make_extractor())


def test_missing_and_damaged_files_are_refused(tmp_path, images):
    path = tmp_path / "file.npz"
    with pytest.raises(ValueError, match="Expected an .npz file at .*file.npz, got .*No such file"):
        load_reference(path, extractor=make_extractor())
    np.savez(path, images)
    path.write_bytes(path.read_bytes()[:200])  # a download that broke
    with pytest.raises(ValueError, match="Expected an .npz file at .*file.npz, got .*not a zip file"):
        NpzImages(path)
    with zipfile.ZipFile(path, "w") as archive:  # an array that was cut off before
        np.save(tmp_path / "array.npy", images)
        archive.writestr("arr_0.npy", (tmp_path / "array.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match="Expected 7 images in .*cut off"):
        NpzImages(path).read(0, 7)
