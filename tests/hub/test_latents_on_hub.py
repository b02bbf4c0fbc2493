# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images, a VAE and latents on a Hub: encoded from it, pushed to it, trained from it; and what if it fails."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffusers_tread.data import LatentsInfo


EXAMPLES = Path(__file__).parents[2] / "examples"
PUSH_SOURCES = """
    import sys
    import datasets
    import numpy as np
    import PIL.Image
    from diffusers import AutoencoderKL

    images = [PIL.Image.fromarray(np.random.RandomState(i).randint(0, 256, (16, 20, 3), np.uint8)) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    records = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    records.push_to_hub("ant/images", num_shards=2)
    AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).push_to_hub("ant/vae")
"""
# Each of the given command lines in turn, as a process of its own would do.
RUN_SCRIPT = """
    import importlib, json, sys
    import datasets
    from accelerate.state import AcceleratorState, GradientState

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 s at the end of each epoch of streamed Parquet files
    sys.path.insert(0, sys.argv[1])
    script = importlib.import_module(sys.argv[2])
    for line in json.loads(sys.argv[3]):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        script.main(line)
"""
ENCODE = [
    *("--dataset_name", "ant/images", "--resolution", "16", "--pretrained_vae_name_or_path", "ant/vae"),
    *("--shard_size", "7", "--batch_size", "4"),
]
TRAIN = [
    *("--train_batch_size", "4", "--max_train_steps", "6", "--shuffle_buffer", "8", "--model_config_name_or_path"),
    '{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}',
]


@pytest.fixture
def run(hub_client):
    def run(script, *lines, **options):
        lines = json.dumps([[str(word) for word in line] for line in lines])
        return hub_client.run(RUN_SCRIPT, EXAMPLES, script, lines, **options)

    return run


@pytest.fixture(scope="module")
def sources(hub_client):
    """Images and a VAE on the Hub."""
    hub_client.run(PUSH_SOURCES)


@pytest.fixture(scope="module")
def latents(sources, hub_client, tmp_path_factory):
    """The folder of latents that lies on the Hub as "ant/latents"."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    line = [*ENCODE, "--output_dir", str(folder), "--push_to_hub", "--hub_dataset_id", "ant/latents"]
    hub_client.run(RUN_SCRIPT, EXAMPLES, "precompute_latents", json.dumps([line]))
    return folder


def weights(output_dir):
    return safetensors.torch.load_file(output_dir / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def assert_same(*output_dirs):
    first, *others = [weights(output_dir) for output_dir in output_dirs]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_latents_arrive_with_all_that_tells_where_they_are_from(hub_server, latents):
    pushed = hub_server.files("ant/latents", "dataset")
    made = {str(path.relative_to(latents)): path.read_bytes() for path in latents.rglob("*") if path.is_file()}
    assert {path: content for path, content in pushed.items() if path != ".gitattributes"} == made
    info = LatentsInfo.load(latents)
    assert len(info.shards) == 3 and info.num_samples == 20 and info.id2label == {0: "ant", 1: "bee"}
    assert info.vae["revision"] == hub_server.repo("ant/vae").at("main").sha
    assert info.source["revision"] == hub_server.repo("ant/images", "dataset").at("main").sha


def test_training_from_the_hub_is_training_from_the_folder(hub_server, latents, run, tmp_path):
    def line(name, *more):
        return [*TRAIN, "--output_dir", tmp_path / name, *more]

    local, there = ("--latents_dir", latents), ("--latents_dir", "ant/latents")
    run("train_tread", line("local", *local), line("hub", *there))
    assert_same(tmp_path / "local", tmp_path / "hub")
    run("train_tread", line("local-stream", *local, "--streaming"), line("hub-stream", *there, "--streaming"))
    assert_same(tmp_path / "local-stream", tmp_path / "hub-stream")

    # The stream breaks off, and goes on.
    hub_server.fail("GET /objects", times=2, status=None)
    hub_server.fail("GET /objects", times=1, status=503)
    run("train_tread", line("unsteady", *there, "--streaming"))
    assert [fault.times for fault in hub_server.faults] == [0, 0]
    assert_same(tmp_path / "local-stream", tmp_path / "unsteady")

    # It breaks off for good, and the same command later goes on.
    def cut_after_an_epoch():
        if len(set(hub_server.sent("GET /objects"))) == 3:
            hub_server.fail("arrow", times=99, status=410)

    hub_server.reset()
    hub_server.on_request = cut_after_an_epoch
    lost = line("lost", *there, "--streaming", "--checkpointing_steps", "2")
    assert "the same command goes on from the last checkpoint" in run("train_tread", lost, check=False).output
    assert (tmp_path / "lost" / "checkpoint-4").exists() and not (tmp_path / "lost" / "pipeline").exists()
    hub_server.reset()
    run("train_tread", lost)
    assert_same(tmp_path / "local-stream", tmp_path / "lost")


def test_images_on_the_hub_are_trained_from(sources, run, tmp_path):
    images = [*TRAIN, "--dataset_name", "ant/images", "--resolution", "16"]
    run(
        "train_tread",
        [*images, "--output_dir", tmp_path / "pixels"],
        [*images, "--output_dir", tmp_path / "encoded", "--pretrained_vae_name_or_path", "ant/vae", "--streaming"],
    )
    assert weights(tmp_path / "pixels")["patch_embedding.weight"].shape[1] == 3
    assert weights(tmp_path / "encoded")["patch_embedding.weight"].shape[1] == 4


def test_a_hub_that_refuses_or_is_away_is_named(hub_server, latents, run, tmp_path):
    hub_server.repo("ant/images", "dataset").gated = True
    encode = [*ENCODE, "--output_dir", tmp_path / "again", "--cache_dir", tmp_path / "cache"]
    gated = run("precompute_latents", encode, token="hf_bee", check=False).output
    hub_server.repo("ant/images", "dataset").gated = False
    assert "Expected access to the data set ant/images" in gated and "accept its terms" in gated

    push = run("precompute_latents", [*encode, "--push_to_hub", "--hub_dataset_id", "bee/latents"], check=False).output
    assert "Expected a token that may write to bee/latents, got one that may not" in push
    assert not (tmp_path / "again").exists()

    train = [*TRAIN, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--latents_dir"]
    for name, faults, more in (("ant/nothing", 0, []), ("ant/latents", 99, []), ("ant/latents", 99, ["--streaming"])):
        hub_server.fail("", times=faults, status=None)
        output = run("train_tread", [*train, name, *more], check=False).output
        assert f"Expected a folder of latents or a data set on the Hub, got '{name}'" in output
        assert "run the same command again: what was downloaded is kept" in output
    assert not (tmp_path / "run").exists()
