# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import resource

import pytest
import torch

from diffusers_tread.metrics import FeatureStore


@pytest.fixture
def store(tmp_path):
    """A store of two batches of one image, claimed."""
    store = FeatureStore(tmp_path / "store", num_images=2, batch_size=1, settings={"a": {"b": 1}})
    assert store.claim() == [0, 1]
    return store


def test_a_folder_that_is_no_store_is_refused(store):
    store.write(1, {"features": torch.ones(1, 2)})
    assert (store.claim(), store.num_done()) == ([0], 1)
    (store.folder / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json"):
        store.claim()


def test_a_full_disk_leaves_whole_batches_only(store):
    store.write(0, {"features": torch.ones(1, 4)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="Expected room for .*run the same command again"):
            store.write(1, {"features": torch.ones(1, 4000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in store.folder.iterdir()) == ["batch-000000.safetensors", "settings.json"]
    assert store.claim() == [1]


def test_a_damaged_batch_is_named(store):
    for batch in range(2):
        store.write(batch, {"features": torch.ones(1, 4)})
    path = store.folder / "batch-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="batch-000001"):
        store.features("features")
