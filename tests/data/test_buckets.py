# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Batches of one of several sizes: which image goes where, in which order, and how a run goes on."""

import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread.data import (
    BucketBatchSampler,
    Buckets,
    EpochBatchSampler,
    TrainingSource,
    center_crop,
    image_size,
    make_batches,
    open_source,
    open_training_data,
)


datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parent))
from tiny_vaes import make_vae  # noqa: E402


BUCKETS = Buckets(((16, 16), (12, 20), (20, 12)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven square, five wide and three tall images, each of a shade of its own; the last wide one is damaged.

    One of the tall images lies on its side, which only its EXIF data say. The last file has no header.
    """
    root = tmp_path_factory.mktemp("images")
    for label in ("ant", "bee"):
        (root / label).mkdir()
    sizes = [(40, 40)] * 7 + [(44, 24)] * 5 + [(24, 44)] * 2 + [(44, 24)]  # width, height
    for index, size in enumerate(sizes):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6 if index == 14 else 1
        name = f"{('ant', 'bee')[index % 2]}/{index:02}.png"
        PIL.Image.new("RGB", size, (10 * index + 5,) * 3).save(root / name, exif=exif)
    damaged = root / "bee" / "11.png"
    damaged.write_bytes(damaged.read_bytes()[:-24])
    (root / "bee" / "99.png").write_bytes(b"no image")
    return root


def shades(batch):
    return [round((float(pixels.mean()) + 1) * 127.5) for pixels in batch["pixel_values"]]


def take(dataset, count, batch_size=2, **options):
    return list(islice(make_batches(dataset, batch_size=batch_size, seed=0, **options), count))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        assert torch.equal(batch["class_labels"], other["class_labels"])
        assert batch.get("position") == other.get("position") and batch["corrupt"] == other["corrupt"]


def test_buckets_are_parsed_as_diffusers_does_and_the_nearest_has_the_likest_shape():
    buckets = Buckets.parse("256,256; 224,288;288,224")
    assert buckets == Buckets(((256, 256), (224, 288), (288, 224))) and buckets.resolution == 288
    sides = range(100, 1000, 90)
    for height, width in [(height, width) for height in sides for width in sides]:
        distance = [abs(height * w - width * h) for h, w in buckets.sizes]
        assert distance[buckets.nearest(height, width)] == min(distance)
    for text in ("", "256", "256,256;256,256", "0,8"):
        with pytest.raises(ValueError, match="[Bb]ucket"):
            Buckets.parse(text)


@pytest.mark.parametrize("size", [(64, 48), (40, 160), (160, 160), (3, 700), (700, 3), (5, 7), (1, 1)])
@pytest.mark.parametrize("bucket", [(8, 8), (8, 16), (24, 8)])
def test_a_crop_fills_its_bucket_without_distortion(size, bucket):
    # Ramps that rise by one from pixel to pixel: the crop of each is a ramp again, equally steep in both directions.
    width, height = size
    ramps = [PIL.Image.fromarray(np.indices((height, width))[axis].astype(np.float32)) for axis in (0, 1)]
    down, right = (np.asarray(center_crop(ramp, bucket)) for ramp in ramps)
    assert down.shape == right.shape == bucket
    scale = max(bucket[0] / height, bucket[1] / width)
    if min(size) >= 40:
        for ramp, axis in ((down, 0), (right, 1)):
            steepness = np.diff(ramp, axis=axis)
            middle = tuple(slice(length // 4, length - length // 4) for length in steepness.shape)
            assert np.allclose(steepness[middle], 1 / scale, rtol=0.1)
        middle = (height - 1) / 2, (width - 1) / 2  # up to half a pixel of the crop
        assert np.abs(np.subtract((down.mean(), right.mean()), middle)).max() < 0.6 / scale


def test_the_size_of_an_image_is_read_from_its_header_and_is_that_of_the_upright_image(folder):
    assert image_size({"path": str(folder / "bee" / "11.png")}, name="x") == (24, 44)  # cut off behind its header
    assert image_size({"path": str(folder / "ant" / "14.png")}, name="x") == (44, 24)
    content = (folder / "ant" / "14.png").read_bytes()
    assert image_size({"bytes": content, "path": None}, name="x") == (44, 24)


def test_every_image_comes_once_per_epoch_of_its_bucket_and_buckets_as_often_as_they_have_images():
    bucket_ids = np.array([0] * 7 + [1] * 2 + [0] * 4 + [2] * 5)
    batches = list(islice(BucketBatchSampler(bucket_ids, batch_size=2, seed=3), 4 * len(bucket_ids)))
    buckets = [{int(bucket_ids[index]) for _, index in batch} for batch in batches]
    assert all(len(bucket) == 1 for bucket in buckets)
    assert Counter(bucket.pop() for bucket in buckets) == {0: 4 * 11, 1: 4 * 2, 2: 4 * 5}
    # Of 4 * N batches of 2 images each, 8 epochs of each bucket.
    seen = Counter(pair for batch in batches for pair in batch)
    assert seen == {(epoch, index): 1 for epoch in range(8) for index in range(len(bucket_ids))}


def test_ranks_get_disjoint_parts_of_one_bucket_and_go_on_anywhere():
    bucket_ids = np.array([0] * 9 + [1] * 8)
    together = list(islice(BucketBatchSampler(bucket_ids, batch_size=6, seed=3), 60))
    parts = [
        list(islice(BucketBatchSampler(bucket_ids, batch_size=3, seed=3, rank=rank, num_ranks=2), 60))
        for rank in range(2)
    ]
    assert [sum(pair, []) for pair in zip(*parts, strict=True)] == together
    for start in (1, 16, 17, 40):
        options = {"batch_size": 3, "seed": 3, "rank": 1, "num_ranks": 2, "first_sample": 6 * start}
        assert list(islice(BucketBatchSampler(bucket_ids, **options), 60 - start)) == parts[1][start:]


def test_one_bucket_is_no_bucket(folder):
    options = {"batch_size": 3, "seed": 5, "rank": 1, "num_ranks": 2, "first_sample": 12}
    one = BucketBatchSampler(np.zeros(10, int), **options)
    assert list(islice(one, 20)) == list(islice(EpochBatchSampler(10, **options), 20))
    for streaming in (False, True):
        options = {"train_data_dir": str(folder), "random_flip": True, "streaming": streaming}
        plain = open_training_data(resolution=16, **options)
        assert_same(take(open_training_data(buckets=Buckets(((16, 16),)), **options), 12), take(plain, 12))


def test_batches_have_one_size_and_damaged_images_make_way_for_others_of_their_bucket(folder):
    dataset = open_training_data(train_data_dir=str(folder), buckets=BUCKETS, random_flip=True)
    assert np.bincount(dataset.bucket_ids).tolist() == [8, 5, 3]  # the one without a header among the squares
    whole = take(dataset, 16)
    members = {(16, 16): set(range(7)), (12, 20): set(range(7, 11)), (20, 12): {12, 13, 14}}
    seen = Counter()
    for batch in whole:
        images = [(shade - 5) // 10 for shade in shades(batch)]
        assert set(images) <= members[tuple(batch["pixel_values"].shape[2:])]
        assert batch["class_labels"].tolist() == [image % 2 for image in images]
        seen.update(images)
    corrupt = {name.split("/")[-1][:6] for batch in whole for name in batch["corrupt"]}
    assert set(seen) == set().union(*members.values()) and corrupt == {"11.png", "99.png"}
    assert (seen[12], seen[13], seen[14]) == (2, 2, 2)  # in 16 batches of 2 two epochs of everything
    assert_same(take(dataset, 11, samples_seen=10, num_workers=1), whole[5:])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stream_of_buckets_goes_on_exactly_and_loses_no_image(folder, num_ranks):
    options = {"train_data_dir": str(folder), "buckets": BUCKETS, "streaming": True, "shuffle_buffer": 4}
    dataset = open_training_data(random_flip=True, **options)
    runs = [take(dataset, 20, batch_size=4, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for rank, whole in enumerate(runs):
        assert {tuple(batch["pixel_values"].shape[2:]) for batch in whole} == set(BUCKETS.sizes)
        places = [batch["position"] for batch in whole[:15]]
        # Two records and more wait there since the epoch before.
        late = [start for start, place in enumerate(places, 1) if sum(old < place[0] for old, _ in place[2:]) > 1]
        for start in (1, late[0], late[-1]):
            options = {"rank": rank, "num_ranks": num_ranks, "num_workers": 3, "batch_size": 4}
            options["stream_positions"] = [list(places[start - 1])] * num_ranks  # as a checkpoint's JSON has it
            assert_same(take(dataset, 20 - start, **options), whole[start:])

    # Every record that was read is in a batch, damaged, or waiting.
    for whole in runs:
        corrupt = 0
        for index, batch in enumerate(whole, 1):
            epoch, place, *waiting = batch["position"]
            corrupt += len(batch["corrupt"])
            assert 4 * index + corrupt + len(waiting) == epoch * 16 // num_ranks + place
    seen = {shade for whole in runs for batch in whole for shade in shades(batch)}
    assert seen == {10 * index + 5 for index in range(15) if index != 11}


def test_sources_with_buckets_know_their_sizes_and_refuse_what_does_not_fit(folder, tmp_path):
    source = open_source(f"folder:{folder}", buckets=BUCKETS)
    assert (source.sizes, source.resolution, source.latent_size) == (BUCKETS.sizes, 20, 20)
    assert open_source(f"folder:{folder}", buckets=BUCKETS, resolution=20).sizes == BUCKETS.sizes
    with pytest.raises(ValueError, match="longest side 20 as resolution, or none, got 16"):
        open_source(f"folder:{folder}", buckets=BUCKETS, resolution=16)
    with pytest.raises(ValueError, match="got 10 of 16x16, 5 of 12x20, 0 of 8x64"):
        open_source(f"folder:{folder}", buckets=Buckets(((16, 16), (12, 20), (8, 64))))
    for data in ("digits:", f"latents:{tmp_path}"):
        with pytest.raises(ValueError, match=r"\['buckets'\]"):
            open_source(data, buckets=BUCKETS)


def test_a_vae_encodes_every_bucket_or_the_wrong_ones_are_named(folder):
    dataset = open_training_data(train_data_dir=str(folder), buckets=BUCKETS)
    source = TrainingSource(dataset, vae=make_vae("sd"))  # of 2 x 2 pixels it makes one
    assert (source.latent_size, source.sizes) == (10, BUCKETS.sizes)
    for batch in take(dataset, 6):
        latents = source.to_latents(batch, device="cpu", generator=torch.Generator())
        assert [2 * side for side in latents.shape[2:]] == list(batch["pixel_values"].shape[2:])
    odd = open_training_data(train_data_dir=str(folder), buckets=Buckets(((16, 16), (11, 20))))
    with pytest.raises(ValueError, match=r"multiples of the VAE's downsampling 2, got \[\(11, 20\)\]"):
        TrainingSource(odd, vae=make_vae("sd"))
