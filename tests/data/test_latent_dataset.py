# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reading folders that `LatentsWriter` wrote."""

import dataclasses
import gc
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch

from diffusers_tread.data import (
    EpochBatchSampler,
    LatentsDataset,
    LatentsInfo,
    LatentsWriter,
    make_batches,
    open_latents,
    open_training_data,
)
from diffusers_tread.files import write_json
from diffusers_tread.seeds import derive_seed


pytest.importorskip("datasets")


def write_latents(folder, *, counts=(5, 4, 2, 1), labels=None, **changes):
    """A folder of random latents in shards of `counts` records; returns them all."""
    fields = {
        "kind": "moments", "dtype": "float16", "latent_channels": 2, "latent_size": 3, "resolution": 24,
        "scaling_factor": 0.5, "vae": {}, "source": {}, "has_flipped": True, "num_samples": 1, "shards": (),
        "id2label": {0: "ant", 1: "bee", 2: "cat"},
    }  # fmt: skip
    info = LatentsInfo(**fields | changes)
    generator, total = torch.Generator().manual_seed(0), sum(counts)
    names = ["moments", "moments_flipped"][: 1 + info.has_flipped]
    records = {name: torch.randn(total, *info.shape, generator=generator).to(info.torch_dtype) for name in names}
    records["label"] = torch.tensor(labels) if labels else torch.randint(3, (total,), generator=generator)

    writer = LatentsWriter(folder, info, num_shards=len(counts))
    writer.open({})
    start = 0
    for shard, count in enumerate(counts):
        batch = {name: values[start : start + count] for name, values in records.items()}
        writer.write(shard, [batch | {"names": [f"image {start + row}" for row in range(count)], "unreadable": []}])
        start += count
    writer.finish()
    return records


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path / "latents")
    return str(tmp_path / "latents")


def take(dataset, count, **options):
    return list(islice(make_batches(dataset, seed=0, **{"batch_size": 4, **options}), count))


def rows_in(values, moments):
    """For each record of a batch, its place in `values`."""
    return [(record == values).flatten(1).all(1).nonzero().item() for record in moments]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["moments"], other["moments"])
        assert torch.equal(batch["class_labels"], other["class_labels"])
        assert batch.get("position") == other.get("position")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["moments", "latents"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_epoch_is_every_record_as_it_was_written(tmp_path, dtype, kind, streaming):
    records = write_latents(tmp_path / "latents", dtype=dtype, kind=kind)
    dataset = open_training_data(latents_dir=str(tmp_path / "latents"), resolution=24, streaming=streaming)
    assert (dataset.num_classes, dataset.channels, dataset.resolution) == (3, 2, 24)
    assert dataset.id2label[2] == "cat" and dataset.info.num_samples == 12

    batches = take(dataset, 3)
    moments, labels = (torch.cat([batch[key] for batch in batches]) for key in ("moments", "class_labels"))
    assert moments.dtype == getattr(torch, dtype) and labels.dtype == torch.int64
    assert all(batch["corrupt"] == [] for batch in batches)
    order = rows_in(records["moments"], moments)
    assert sorted(order) == list(range(12)) != order
    assert torch.equal(labels, records["label"][order])


def test_a_flip_takes_the_mirrored_images_latents_by_epoch_and_record(tmp_path):
    records = write_latents(tmp_path / "latents")
    dataset = LatentsDataset(tmp_path / "latents", seed=5, random_flip=True)
    flips = []
    for keys in islice(EpochBatchSampler(12, batch_size=4, seed=0), 24):
        batch = dataset.__getitems__(keys)
        for (epoch, index), moments in zip(keys, batch["moments"], strict=True):
            flips.append(derive_seed(5, "flip", epoch, index) % 2)
            assert torch.equal(moments, records["moments_flipped" if flips[-1] else "moments"][index])
        assert torch.equal(batch["class_labels"], records["label"][[index for _, index in keys]])
    assert 24 < sum(flips) < 72


def test_a_stream_flips_anew_in_each_epoch(folder):
    values = LatentsDataset(folder, seed=0).source.with_format(None)[:]
    values = {name: torch.tensor(values[name]).view(12, 4, 3, 3).half() for name in ("moments", "moments_flipped")}
    batches = take(open_latents(folder, streaming=True, random_flip=True), 12)
    states = [
        (record == values["moments_flipped"]).flatten(1).all(1).any().item()
        for batch in batches
        for record in batch["moments"]
    ]
    assert 12 < sum(states) < 36


def test_batches_do_not_depend_on_workers_and_start_anywhere(folder):
    dataset = open_latents(folder, random_flip=True)
    whole = take(dataset, 8)
    assert_same(take(dataset, 8, num_workers=2), whole)
    assert_same(take(dataset, 5, samples_seen=12), whole[3:])
    halves = [take(dataset, 8, batch_size=2, rank=rank, num_ranks=2) for rank in range(2)]
    joined = [torch.cat([part["moments"] for part in parts]) for parts in zip(*halves, strict=True)]
    assert all(torch.equal(part, batch["moments"]) for part, batch in zip(joined, whole, strict=True))


def test_a_pickled_data_set_is_small_and_reads_the_same(folder):
    dataset = open_latents(folder)
    pickled = pickle.dumps(dataset)  # what a spawned worker gets
    assert len(pickled) < 20_000
    assert_same(take(pickle.loads(pickled), 4), take(dataset, 4))


@pytest.mark.parametrize("num_ranks", [2, 3])  # four shards: shared by shards, or by records
def test_a_stream_goes_on_from_a_position_on_each_rank(folder, num_ranks):
    dataset = open_latents(folder, streaming=True, random_flip=True, shuffle_buffer=3)
    seen, positions = [], []
    for rank in range(num_ranks):
        options = {"batch_size": 1, "rank": rank, "num_ranks": num_ranks}
        whole = take(dataset, 20, **options)
        assert whole[-1]["position"][0] >= 2
        for start in (3, 8):
            positions = [whole[start - 1]["position"]] * num_ranks
            assert_same(take(dataset, 20 - start, stream_positions=positions, **options), whole[start:])
        assert_same(take(dataset, 6, num_workers=2, **options), whole[:6])
        seen += [batch["moments"] for batch in take(open_latents(folder, streaming=True), 20, **options)
                 if batch["position"][0] == 0]  # fmt: skip
    assert len({tuple(record.flatten().tolist()) for record in seen}) == len(seen) == 12


def test_memory_stays_flat_over_an_epoch(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("Needs /proc.")
    write_latents(tmp_path / "latents", counts=(256,) * 4, latent_channels=4, latent_size=64, has_flipped=False)
    batches = make_batches(open_latents(tmp_path / "latents"), batch_size=16, seed=0)
    next(batches)
    gc.collect()
    before = anonymous_memory()
    for _ in range(64):
        next(batches)
    assert anonymous_memory() - before < 16 * 2**20  # of 67 MB that were read


def anonymous_memory():
    """Bytes of this process that are no copies of files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_that_are_missing_or_cut_off_are_named_before_any_work(folder, streaming):
    first, second, _, last = sorted(Path(folder, "data").iterdir())
    second.unlink()
    last.write_bytes(last.read_bytes()[:-64])
    with pytest.raises(ValueError) as error:
        open_latents(folder, streaming=streaming)
    assert second.name in str(error.value) and last.name in str(error.value) and first.name not in str(error.value)


def test_a_shard_of_other_content_is_refused(tmp_path, folder):
    info = LatentsInfo.load(folder)
    shards = [shard | {"num_samples": 6} for shard in info.shards]
    changed = dataclasses.replace(info, shards=tuple(shards), num_samples=24)
    write_json(Path(folder, "latents.json"), changed.to_dict())
    with pytest.raises(ValueError, match="Expected 6 records .*train-00000.*got 5"):
        open_latents(folder)
    write_json(Path(folder, "latents.json"), dataclasses.replace(info, latent_size=4).to_dict())
    with pytest.raises(ValueError, match="train-00000"):
        open_latents(folder)


def test_labels_beyond_the_classes_are_refused(folder):
    info = LatentsInfo.load(folder)
    write_json(Path(folder, "latents.json"), info.to_dict() | {"id2label": {"0": "ant"}})
    with pytest.raises(ValueError, match=r"labels in \[0, 1\)"):
        open_latents(folder)
    with pytest.raises(ValueError, match=r"labels in \[0, 1\)"):
        take(open_latents(folder, streaming=True), 3)


def test_options_that_do_not_fit_are_refused(folder, tmp_path):
    write_latents(tmp_path / "plain", has_flipped=False)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="Expected latents of mirrored images"):
            open_latents(tmp_path / "plain", random_flip=True, streaming=streaming)
    with pytest.raises(ValueError, match="Expected resolution 24.*got 32"):
        open_training_data(latents_dir=folder, resolution=32)
    with pytest.raises(ValueError, match="train_data_dir.*num_classes"):
        open_training_data(latents_dir=folder, train_data_dir=folder, num_classes=3)
    with pytest.raises(ValueError, match="2 processes"):
        take(open_latents(folder, streaming=True), 1, stream_positions=[(0, 0)] * 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="latents.json"):
        open_latents(tmp_path / "empty")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["ant/latents", "/no/such folder"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(name, streaming, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"got '{name}': there is no such folder"):
        open_latents(name, streaming=streaming, cache_dir=str(tmp_path))
