# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread.data import (
    DigitsDataset,
    center_crop,
    collate_images,
    image_to_tensor,
    make_batches,
    open_images,
    open_training_data,
)


datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of five noise images each; the last file is cut off."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir()
        for index in range(5):
            pixels = np.random.RandomState(10 * label + index).randint(0, 256, (20, 24, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / name / f"{index}.png")
    damaged = root / "bee" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    return str(root)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def take(dataset, count, **options):
    return list(islice(make_batches(dataset, seed=0, **{"batch_size": 3, **options}), count))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        assert torch.equal(batch["class_labels"], other["class_labels"])
        assert batch.get("position") == other.get("position") and batch["corrupt"] == other["corrupt"]


def test_digits_are_the_scaled_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, reference = DigitsDataset(), load_digits()
    item = digits[(0, 7)]
    np.testing.assert_allclose(item["pixel_values"][0], reference.images[7] / 8 - 1)
    assert item["class_labels"] == reference.target[7]
    assert (digits.images.min(), digits.images.max(), len(digits), digits.num_classes) == (-1, 1, 1797, 10)


@pytest.mark.parametrize("size", [(37, 20), (20, 37), (8, 8), (70, 33), (5, 7)])
def test_center_crop_is_square_and_keeps_the_middle(size):
    # A ramp that rises to the middle and falls again: about 32 per pixel of the crop.
    width, height = size
    ramp = np.minimum(np.arange(width), np.arange(width)[::-1])[None, :].repeat(height, 0)
    image = PIL.Image.fromarray((255 * ramp / ramp.max()).astype(np.uint8)).convert("RGB")
    cropped = np.asarray(center_crop(image, 8), dtype=np.float32)
    assert cropped.shape == (8, 8, 3)
    assert np.abs(cropped - cropped[:, ::-1]).max() <= 32  # odd sizes may be off by half a pixel


def test_center_crop_halves_with_a_box_filter_before_the_bicubic_one():
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    # 32 -> 16 -> 8: means of 4x4 pixels up to the rounding at each of the two; a bicubic resize is far from them.
    expected = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    image = PIL.Image.fromarray(pixels)
    assert np.abs(np.asarray(center_crop(image, 8)) - expected).max() <= 2
    assert np.abs(np.asarray(image.resize((8, 8), PIL.Image.Resampling.BICUBIC)) - expected).max() > 5


def test_image_to_tensor_maps_bytes_to_minus_one_and_one():
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 2] = (255, 0, 51)
    tensor = image_to_tensor(PIL.Image.fromarray(pixels))
    assert tensor.shape == (3, 2, 3)
    assert tensor[:, 0, 2].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_a_folder_gives_classes_by_subfolder_and_replaces_the_damaged_image(folder):
    dataset = open_training_data(train_data_dir=folder, resolution=8)
    assert dataset.id2label == {0: "ant", 1: "bee"} and len(dataset) == 10
    items = [dataset[(0, index)] for index in range(10)]
    assert [item["class_labels"] for item in items] == [0] * 5 + [1] * 4 + [0]
    assert [item["corrupt"] for item in items[:9]] == [[]] * 9
    assert items[9]["corrupt"] == [f"{folder}/bee/4.png (OSError: image file is truncated)"]
    assert torch.equal(items[9]["pixel_values"], items[0]["pixel_values"])


def test_flips_depend_on_epoch_and_image_and_mirror_the_columns(folder):
    plain = open_training_data(train_data_dir=folder, resolution=8)
    flipped = open_training_data(train_data_dir=folder, resolution=8, random_flip=True)
    states = {}
    for epoch in range(8):
        for index in range(9):
            one, other = plain[(epoch, index)]["pixel_values"], flipped[(epoch, index)]["pixel_values"]
            states[epoch, index] = torch.equal(one.flip(-1), other)
            assert states[epoch, index] or torch.equal(one, other)
    assert 20 < sum(states.values()) < 52
    assert any(states[0, index] != states[1, index] for index in range(9))


def test_batches_do_not_depend_on_workers_and_start_anywhere(folder):
    dataset = open_training_data(train_data_dir=folder, resolution=8, random_flip=True)
    whole = take(dataset, 8)
    assert_same(take(dataset, 8, num_workers=2), whole)
    assert_same(take(dataset, 5, samples_seen=9), whole[3:])


def test_a_stream_goes_on_from_a_position_over_epochs_and_past_damaged_images(folder):
    dataset = open_training_data(
        train_data_dir=folder, resolution=8, random_flip=True, streaming=True, shuffle_buffer=4
    )
    whole = take(dataset, 12)
    assert whole[-1]["position"][0] >= 3 and any(batch["corrupt"] for batch in whole)
    for start in (2, 5):
        rest = take(dataset, 12 - start, stream_positions=[whole[start - 1]["position"]])
        assert_same(rest, whole[start:])
    assert_same(take(dataset, 6, num_workers=3), whole[:6])


def test_ranks_of_a_stream_share_each_epoch(folder):
    dataset = open_training_data(train_data_dir=folder, resolution=8, streaming=True, shuffle_buffer=4)
    seen = []
    for rank in range(2):
        batches = take(dataset, 5, batch_size=1, rank=rank, num_ranks=2)
        seen += [batch["pixel_values"] for batch in batches if batch["position"][0] == 0]
    distinct = {tuple(pixels.flatten().tolist()) for pixels in seen}
    assert len(distinct) == len(seen) == 9  # ten images, one of them damaged


def test_unusable_data_is_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ValueError, match="label_column|Expected a column 'kind'"):
        open_images(train_data_dir=folder, label_column="kind")
    with pytest.raises(ValueError, match="num_classes >= 2"):
        open_images(train_data_dir=folder, num_classes=1)
    with pytest.raises(ValueError, match="Expected resolution"):
        open_training_data(train_data_dir=folder)
    with pytest.raises(ValueError, match="digits"):
        open_training_data(random_flip=True)
    with pytest.raises(ValueError, match="2 processes"):
        take(open_training_data(train_data_dir=folder, resolution=8, streaming=True), 1, stream_positions=[(0, 0)] * 2)


def write_labels(folder, labels):
    images = [PIL.Image.new("RGB", (8, 8))] * len(labels)
    datasets.Dataset.from_dict({"image": images, "label": labels}).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [([0, 3], 3, r"\[0, 3\)"), ([-1, 0], None, r"\[-1, 0\]"), (["a", "b"], None, "integer class label")],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, num_classes, message):
    write_labels(tmp_path, labels)
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path), num_classes=num_classes)


def test_a_streamed_label_beyond_the_classes_is_refused_when_met(tmp_path):
    write_labels(tmp_path, [0, 7])
    with pytest.raises(ValueError, match="Expected num_classes"):
        open_images(str(tmp_path), streaming=True)
    dataset = open_training_data(str(tmp_path), resolution=8, streaming=True, num_classes=3)
    with pytest.raises(ValueError, match="got 7"):
        take(dataset, 2, batch_size=1)


def test_collated_labels_are_integers_and_corrupt_names_are_joined():
    item = {"pixel_values": torch.zeros(1, 2, 2), "class_labels": 3, "corrupt": ["image 1"]}
    batch = collate_images([item, item | {"corrupt": []}])
    assert batch["class_labels"].dtype == torch.int64 and batch["corrupt"] == ["image 1"]
    assert batch["pixel_values"].shape == (2, 1, 2, 2)
