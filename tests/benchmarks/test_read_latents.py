# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/read_latents.py, on too few records to measure anything."""

import json

import numpy as np
import pytest


pytest.importorskip("datasets")
pytest.importorskip("lmdb")
import latent_formats  # noqa: E402
import read_latents  # noqa: E402


TINY = "--num_samples 64 --latent_size 2 --batch_size 8 --repeats 2 --seconds 0.01".split()


def test_it_writes_what_it_measured(tmp_path):
    path = tmp_path / "new" / "report.json"
    flags = "--num_workers 0 --consumer_rate 1000 --consumer_steps 3 --formats arrow,lmdb".split()
    report = read_latents.main([*TINY, *flags, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert [row["format"] for row in report["formats"]] == ["arrow", "lmdb"]
    assert all(row["bytes"] > 64 * 8 * 4 * 2 for row in report["formats"])
    assert [row["streaming"] for row in report["loaders"]] == [False, True]
    for row in report["loaders"]:
        assert 0 <= row["waiting_share"] < 1 and row["median_wait_seconds"] <= row["longest_wait_seconds"]
        assert row["epoch_bytes"] == 64 * 8 * 4 * 2


@pytest.mark.parametrize("name", latent_formats.FORMATS)
def test_every_format_gives_back_what_was_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_formats, "SHARD", 20)
    moments, labels = np.random.rand(50, 32).astype(np.float16), np.arange(50)
    write, open_ = latent_formats.FORMATS[name]
    write(tmp_path, moments, labels)
    read, seen = open_(tmp_path), []
    for indices in np.random.RandomState(0).permutation(50).reshape(5, 10):
        values, classes = read(indices)
        np.testing.assert_array_equal(values, moments[classes])
        if name not in latent_formats.SEQUENTIAL:
            np.testing.assert_array_equal(classes, indices)
        seen += classes.tolist()
    assert name in latent_formats.SEQUENTIAL or sorted(seen) == list(range(50))
