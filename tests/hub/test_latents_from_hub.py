# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Latents pushed to a server that speaks the Hub's protocol and read from there, downloaded and streamed."""

import json

import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter


PUSH = """
import sys
from diffusers_tread.hub import upload_folder
upload_folder(sys.argv[1], repo_id=sys.argv[2], repo_type="dataset", private=True)
"""
READ = """
import json, sys
from itertools import islice
import torch
from diffusers_tread.data import make_batches, open_latents
name, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
dataset = open_latents(name, random_flip=True, shuffle_buffer=5, **options)
torch.save(list(islice(make_batches(dataset, batch_size=4, seed=0), 6)), output)
"""


@pytest.fixture
def folder(tmp_path):
    info = LatentsInfo(
        kind="moments", dtype="bfloat16", latent_channels=2, latent_size=3, resolution=24, scaling_factor=0.5, vae={},
        source={}, has_flipped=True, id2label={0: "ant", 1: "bee"}, num_samples=1, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(tmp_path / "latents", info, num_shards=3)
    writer.open({})
    for shard in range(3):
        batch = {"names": ["image"] * 5, "unreadable": [], "label": torch.randint(2, (5,))}
        writer.write(shard, [batch | {key: torch.randn(5, 4, 3, 3) for key in ("moments", "moments_flipped")}])
    writer.finish()
    return tmp_path / "latents"


@pytest.fixture
def read(hub_client, tmp_path):
    def run(name, check=True, **options):
        output = tmp_path / "batches.pt"
        result = hub_client.run(READ, name, output, json.dumps(options), check=check)
        return torch.load(output) if check else result.output

    return run


@pytest.mark.parametrize("streaming", [False, True])
def test_latents_from_the_hub_are_those_of_the_folder(streaming, hub_server, hub_client, repo_id, folder, read):
    hub_client.run(PUSH, folder, repo_id)
    batches, expected = (read(name, streaming=streaming) for name in (repo_id, folder))
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["moments"], other["moments"]) and batch["moments"].dtype == torch.bfloat16
        assert torch.equal(batch["class_labels"], other["class_labels"])
        assert batch.get("position") == other.get("position")


def test_a_shard_that_the_repository_lacks_is_named(hub_server, hub_client, repo_id, folder, read):
    lacking = next(folder.rglob("train-00001*"))
    lacking.unlink()
    hub_client.run(PUSH, folder, repo_id)
    for streaming in (False, True):
        message = read(repo_id, check=False, streaming=streaming)
        assert "\nValueError: Expected" in message and lacking.name in message


def test_a_stream_of_a_shard_that_was_changed_is_refused_by_the_checksum_of_the_hub(
    hub_server, hub_client, repo_id, folder, read
):
    changed = next(folder.rglob("train-00001*"))
    changed.write_bytes(changed.read_bytes()[:-100] + b"\1" * 92 + changed.read_bytes()[-8:])
    hub_client.run(PUSH, folder, repo_id)
    message = read(repo_id, check=False, streaming=True)
    assert "ValueError: Expected the shards of" in message and f"['data/{changed.name}'] missing, cut off" in message


def test_a_download_that_broke_off_goes_on_with_what_is_missing(hub_server, hub_client, repo_id, folder, read):
    hub_client.run(PUSH, folder, repo_id)
    hub_server.fail("HEAD .*/resolve/.*train-00001", times=100, status=403)
    assert "run the same command again" in read(repo_id, check=False)
    hub_server.faults.clear()
    read(repo_id)
    for shard in LatentsInfo.load(folder).shards:
        assert len(hub_server.sent(f"GET .*{shard['sha256']}")) == 1


def test_a_stream_that_is_lost_says_how_to_go_on(hub_server, hub_client, repo_id, folder, read):
    hub_client.run(PUSH, folder, repo_id)
    hub_server.fail("GET .*(train-00001|" + LatentsInfo.load(folder).shards[1]["sha256"] + ")", times=100, status=403)
    message = read(repo_id, check=False, streaming=True)
    assert "ConnectionError: Expected to go on reading" in message and "goes on from the last checkpoint" in message
