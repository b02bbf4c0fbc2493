# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images, a VAE and latents on a Hub: encoded from it, pushed to it, trained from it; and what if it fails."""

import itertools

import pytest
import safetensors.torch
import torch

from diffusers_tread.data import LatentsInfo


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
ENCODE = [
    *("--data", "hub:ant/images", "--resolution", "16", "--pretrained_vae_name_or_path", "ant/vae"),
    *("--shard_size", "7", "--batch_size", "4"),
]
TRAIN = [
    *("--train_batch_size", "4", "--max_train_steps", "6", "--shuffle_buffer", "8", "--model_config_name_or_path"),
    '{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}',
]


@pytest.fixture(scope="module")
def sources(hub_client):
    """Images and a VAE on the Hub."""
    hub_client.run(PUSH_SOURCES)


@pytest.fixture(scope="module")
def latents(sources, run_example, tmp_path_factory):
    """The folder of latents that lies on the Hub as "ant/latents"."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    push = ("--push_to_hub", "--hub_dataset_id", "ant/latents")
    run_example("precompute_latents", [*ENCODE, "--output_dir", folder, *push])
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


@pytest.mark.slow
def test_training_from_the_hub_is_training_from_the_folder(hub_server, latents, run_example, tmp_path):
    def line(name, *more):
        return [*TRAIN, "--output_dir", tmp_path / name, *more]

    local, there = ("--data", f"latents:{latents}"), ("--data", "latents:ant/latents")
    run_example("train_tread", line("local", *local), line("hub", *there))
    assert_same(tmp_path / "local", tmp_path / "hub")
    run_example("train_tread", line("local-stream", *local, "--streaming"), line("hub-stream", *there, "--streaming"))
    assert_same(tmp_path / "local-stream", tmp_path / "hub-stream")

    # The stream breaks off, and goes on.
    hub_server.fail("GET /objects", times=2, status=None)
    hub_server.fail("GET /objects", times=1, status=503)
    run_example("train_tread", line("unsteady", *there, "--streaming"))
    assert [fault.times for fault in hub_server.faults] == [0, 0]
    assert_same(tmp_path / "local-stream", tmp_path / "unsteady")

    # It breaks off for good, and the same command later goes on.
    def cut_after_an_epoch():
        if len(set(hub_server.sent("GET /objects"))) == 3:
            hub_server.fail("arrow", times=99, status=410)

    hub_server.reset()
    hub_server.on_request = cut_after_an_epoch
    lost = line("lost", *there, "--streaming", "--checkpointing_steps", "2")
    assert "the same command goes on from the last checkpoint" in run_example("train_tread", lost, check=False).output
    assert (tmp_path / "lost" / "checkpoint-4").exists() and not (tmp_path / "lost" / "pipeline").exists()
    hub_server.reset()
    run_example("train_tread", lost)
    assert_same(tmp_path / "local-stream", tmp_path / "lost")


def test_images_on_the_hub_are_trained_from(sources, run_example, tmp_path):
    images = [*TRAIN, "--data", "hub:ant/images", "--resolution", "16"]
    run_example(
        "train_tread",
        [*images, "--output_dir", tmp_path / "pixels"],
        [*images, "--output_dir", tmp_path / "encoded", "--pretrained_vae_name_or_path", "ant/vae", "--streaming"],
    )
    assert weights(tmp_path / "pixels")["patch_embedding.weight"].shape[1] == 3
    assert weights(tmp_path / "encoded")["patch_embedding.weight"].shape[1] == 4


def test_images_without_access_are_named_and_the_same_command_goes_on(hub_server, sources, run_example, tmp_path):
    images = hub_server.repo("ant/images", "dataset")
    encode = [*ENCODE, "--output_dir", tmp_path / "latents", "--cache_dir", tmp_path / "cache"]
    images.gated = True
    result = run_example("precompute_latents", encode, token="hf_bee", check=False)
    assert "ValueError: Expected access to the data set ant/images, got: " in result.output
    assert (
        "accept its terms at https://huggingface.co/datasets/ant/images. Check the name, the network" in result.output
    )
    assert result.returncode != 0 and not (tmp_path / "latents").exists()

    images.readers.add("bee")
    run_example("precompute_latents", encode, token="hf_bee")
    images.gated = False
    info = LatentsInfo.load(tmp_path / "latents")
    assert info.num_samples == 20 and info.source["revision"] == images.at("main").sha


def test_a_hub_that_refuses_or_is_away_is_named(hub_server, latents, run_example, tmp_path):
    encode = [*ENCODE, "--output_dir", tmp_path / "again", "--cache_dir", tmp_path / "cache"]
    push = run_example(
        "precompute_latents", [*encode, "--push_to_hub", "--hub_dataset_id", "bee/latents"], check=False
    ).output
    assert "Expected a token that may write to bee/latents, got one that may not" in push
    assert not (tmp_path / "again").exists()

    train = [*TRAIN, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    for name, more in itertools.product(("ant/nothing", "ant/latents"), ([], ["--streaming"])):
        hub_server.fail("", times=0 if name == "ant/nothing" else 99, status=None)
        output = run_example("train_tread", [*train, "--data", f"latents:{name}", *more], check=False).output
        assert f"ValueError: Expected a folder of latents or a data set on the Hub, got '{name}'" in output
        assert "run the same command again: what was downloaded is kept" in output
    assert not (tmp_path / "run").exists()
