# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Records of shards that are damaged: the shard is written again."""

import json

import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter


INFO = LatentsInfo(
    kind="latents", dtype="float32", latent_channels=1, latent_size=2, resolution=16, scaling_factor=1.0, vae={},
    source={}, id2label={0: "ant"}, num_samples=1, shards=(),
)  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"size": 3}', '{"unreadable": 3}', "\x00"])
def test_a_damaged_record_counts_as_missing(tmp_path, content):
    def open_writer():
        writer = LatentsWriter(tmp_path, INFO, num_shards=2)
        return writer, writer.open({})

    writer, missing = open_writer()
    batch = {"names": ["0"], "unreadable": [], "moments": torch.zeros(1, 1, 2, 2), "label": [0]}
    for shard in missing:
        writer.write(shard, [batch])
    record = next((tmp_path / "unfinished").glob("*00001-of*.json"))
    assert json.loads(record.read_text())["num_samples"] == 1
    record.write_text(content)
    writer, missing = open_writer()
    assert missing == [1]
    writer.write(1, [batch])
    assert writer.finish().num_samples == 2
