# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from diffusers_tread.data import (
    LatentsInfo,
    make_batches,
    open_training_data,
)
from diffusers_tread.training.checkpoints import write_json


datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")


def write_latents(folder, *, counts=(5, 4, 3), dtype="float16", kind="moments", has_flipped=True, rows=2, labels=None):
    """A folder of random latents in shards of `counts` records; returns the values and labels."""
    rng, num_samples = np.random.RandomState(0), sum(counts)
    info = LatentsInfo(
        kind=kind, dtype=dtype, latent_channels=2, latent_size=3, resolution=24, scaling_factor=0.5, shift_factor=0.1,
        vae={}, source={}, has_flipped=has_flipped, id2label={0: "ant", 1: "bee", 2: "cat"}, num_samples=num_samples,
        shards=(),
    )  # fmt: skip
    tensors = {
        name: torch.from_numpy(rng.randn(num_samples, *info.shape)).to(info.torch_dtype)
        for name in ("moments", "moments_flipped")[: 1 + has_flipped]
    }
    labels = rng.randint(0, 3, num_samples) if labels is None else np.array(labels)

    schema, shards, first = info.features().arrow_schema, [], 0
    (folder / "data").mkdir(parents=True)
    for number, count in enumerate(counts):
        path = folder / "data" / f"train-{number:05d}-of-{len(counts):05d}.arrow"
        with pa.ipc.new_stream(str(path), schema) as writer:
            for start in range(first, first + count, rows):
                place = slice(start, min(start + rows, first + count))
                columns = [
                    pa.FixedSizeListArray.from_arrays(pa.array(as_numpy(tensor[place]).reshape(-1)), tensor[0].numel())
                    for tensor in tensors.values()
                ]
                writer.write_batch(pa.record_batch([*columns, pa.array(labels[place])], schema=schema))
        first += count
        file = f"data/{path.name}"
        shards.append({"file": file, "num_samples": count, "size": path.stat().st_size, "sha256": ""})
    write_json(folder / "latents.json", replace(info, shards=tuple(shards)).to_dict())
    return tensors, torch.from_numpy(labels)


def as_numpy(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def take(dataset, count, **options):
    return list(islice(make_batches(dataset, seed=0, **{"batch_size": 4, **options}), count))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["moments"], other["moments"])
        assert torch.equal(batch["class_labels"], other["class_labels"])
        assert batch.get("position") == other.get("position")


@pytest.mark.parametrize("kind", ["moments", "latents"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_record_is_read_as_it_was_written(tmp_path, dtype, kind):
    tensors, labels = write_latents(tmp_path / "latents", dtype=dtype, kind=kind)
    for streaming in (False, True):
        dataset = open_training_data(latents_dir=str(tmp_path / "latents"), streaming=streaming)
        assert (dataset.num_classes, dataset.channels, dataset.resolution) == (3, 2, 24)
        assert dataset.id2label[2] == "cat" and dataset.info.num_samples == 12
        batches = take(dataset, 3)
        moments = torch.cat([batch["moments"] for batch in batches])
        assert moments.dtype == dataset.info.torch_dtype and batches[0]["corrupt"] == []
        order = [(moments[row] == tensors["moments"]).flatten(1).all(1).nonzero().item() for row in range(12)]
        assert sorted(order) == list(range(12)) != order
        assert torch.equal(torch.cat([batch["class_labels"] for batch in batches]), labels[order])
