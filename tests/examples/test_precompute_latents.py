# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from runs import call, files_of, launch
from tiny_models import cut_off, save_noise, save_vae

from diffusers_tread.data import LatentsInfo, center_crop, image_to_tensor
from diffusers_tread.fingerprint import weights_fingerprint
from diffusers_tread.runs import presets
from diffusers_tread.runs.parsing import parse_config


datasets = pytest.importorskip("datasets")
import precompute_latents  # noqa: E402
from precompute_latents import PrecomputeConfig  # noqa: E402


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
NUM_IMAGES, DAMAGED = 30, 19
precompute = partial(call, precompute_latents)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two classes of 15 noise images each, one of them cut off, a tiny VAE, and a cache for `datasets`."""
    root = tmp_path_factory.mktemp("made")
    for label, name in enumerate(("ant", "bee")):
        save_noise(root / "images" / name, NUM_IMAGES // 2, 20, 24, seed=label)
    cut_off(sorted(root.rglob("*.png"))[DAMAGED])
    save_vae(root / "kl", latent_channels=16, shift_factor=0.1)
    AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41,
    ).save_pretrained(root / "dc")  # fmt: skip
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.5,
    ).save_pretrained(root / "tiny")  # fmt: skip
    return root


def flags(made, output_dir, *more, vae="kl"):
    return [
        *("--data", f"folder:{made / 'images'}", "--resolution", 16, "--cache_dir", made / "cache"),
        *("--pretrained_vae_name_or_path", made / vae, "--output_dir", output_dir),
        *("--shard_size", 7, "--batch_size", 3, *more),
    ]


def contents(folder):
    """Every file but the card, which names the folder."""
    return {name: content for name, content in files_of(folder).items() if name != "README.md"}


def read(folder, column="moments"):
    """The records of all shards, as plain `datasets` gives them."""
    info = LatentsInfo.load(folder)
    tables = [datasets.Dataset.from_file(str(Path(folder, shard["file"]))) for shard in info.shards]
    table = datasets.concatenate_datasets(tables).with_format("arrow")[:]
    values = torch.tensor(table[column].combine_chunks().flatten().to_numpy())
    values = values.view(torch.bfloat16) if info.dtype == "bfloat16" else values
    return values.view(-1, *info.shape), table["label"].to_pylist()


def prepared_images(made, *, mirrored=False):
    paths = sorted((made / "images").rglob("*.png"))
    images = [center_crop(PIL.Image.open(path), 16) for index, path in enumerate(paths) if index != DAMAGED]
    if mirrored:
        images = [image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    return torch.stack([image_to_tensor(image) for image in images])


@pytest.mark.slow
def test_any_number_of_processes_and_kills_give_the_same_bytes(made, tmp_path):
    """Killed several times in a row, by one and by two processes in turn; stopped by a limit on the size of files."""
    chance = random.Random(seed := int.from_bytes(os.urandom(4), "little"))
    print(f"kills of seed {seed}")
    argv = {name: flags(made, tmp_path / name, "--flip") for name in ("one", "two", "killed", "limited")}
    plan = [{"argv": argv["one"]}, {"argv": argv["two"] + ["--dataloader_num_workers", 1], "processes": 2}]
    # In the middle of a shard, and around each step in which a file is published.
    events = ["diffusers_tread.data.latents.encoding.encode_moments", "os.fsync", "os.replace"]
    for turn in range(4):
        processes = 1 + turn % 2
        # First before the folder has its settings, then anywhere.
        kill = {"at": events, "rank": chance.randrange(processes), "count": chance.randint(1, 18) if turn > 0 else 1}
        plan.append({"argv": argv["killed"], "processes": processes, "kill": kill})
    plan += [{"argv": argv["killed"]}, {"argv": argv["limited"], "limit": 9000}, {"argv": argv["limited"]}]
    codes, output = launch([entry | {"script": "precompute_latents"} for entry in plan])

    # The first kill always hits; later ones may come to a run that ends before.
    assert codes[:3] == [0, 0, -9] and set(codes[3:6]) <= {0, -9} and codes[6:] == [0, 1, 0]
    whole = contents(tmp_path / "one")
    assert len(whole) == 5 + 2 and LatentsInfo.load(tmp_path / "one").num_samples == NUM_IMAGES - 1
    for name in ("two", "killed", "limited"):
        assert contents(tmp_path / name) == whole
    assert "Expected room for" in output and "run the same command, which goes on with the missing shards" in output


@pytest.mark.parametrize(
    ("vae", "dtype", "vae_dtype", "kind", "channels"),
    [("kl", "float16", "float32", "moments", 16), ("dc", "bfloat16", "float32", "latents", 4),
     ("tiny", "float32", "bfloat16", "latents", 4)],
)  # fmt: skip
def test_the_folder_holds_what_the_vae_gives(made, tmp_path, vae, dtype, vae_dtype, kind, channels):
    output = tmp_path / "latents"
    precompute(*flags(made, output, "--flip", "--dtype", dtype, "--vae_dtype", vae_dtype, vae=vae))
    model = {"kl": AutoencoderKL, "dc": AutoencoderDC, "tiny": AutoencoderTiny}[vae].from_pretrained(made / vae).eval()

    # Description.
    info = LatentsInfo.load(output)
    assert (info.kind, info.dtype, info.latent_channels, info.latent_size, info.resolution) == (
        kind, dtype, channels, 8, 16,
    )  # fmt: skip
    assert (info.scaling_factor, info.shift_factor) == (
        model.config.scaling_factor,
        0.1 if vae == "kl" else 0.0,
    )
    assert info.vae == {
        "name_or_path": str(made / vae), "subfolder": None, "revision": None, "class_name": type(model).__name__,
        "fingerprint": weights_fingerprint(model), "dtype": vae_dtype,
    }  # fmt: skip
    assert info.source == {"train_data_dir": "images", "split": "train", "columns": ["image", "label"]}
    assert info.id2label == {0: "ant", 1: "bee"} and info.has_flipped
    assert info.num_samples == NUM_IMAGES - 1 and info.unreadable == ("image 19 (bee/04.png)",)

    # Values, against the VAE called by hand.
    model.to(getattr(torch, vae_dtype))
    for column, mirrored in (("moments", False), ("moments_flipped", True)):
        with torch.no_grad():
            encoded = model.encode(prepared_images(made, mirrored=mirrored).to(model.dtype))
        if kind == "moments":
            expected = torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar.div(2).exp()], dim=1)
        else:
            expected = encoded.latent if vae == "dc" else encoded.latents
        values, labels = read(output, column)
        assert labels == [0] * 15 + [1] * 14
        # The coarser of both precisions; in batches of another size.
        tolerance = 2e-3 if dtype == "float16" else 2e-2
        torch.testing.assert_close(values.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_the_card_is_metadata_and_a_snippet_that_run(made, tmp_path, monkeypatch):
    from huggingface_hub import DatasetCard

    for dtype, vae in (("float16", "kl"), ("bfloat16", "tiny")):
        output = tmp_path / vae
        precompute(*flags(made, output, "--dtype", dtype, "--hub_dataset_id", f"ant/{vae}", vae=vae))
        card = DatasetCard.load(output / "README.md")
        assert card.data.configs == [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.arrow"}]}
        ]
        (snippet,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
        assert f'"ant/{vae}"' in snippet
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        namespace = {}
        exec(snippet.replace(f'"ant/{vae}"', repr(str(output))), namespace)

        values, labels = read(output)
        info = LatentsInfo.load(output)
        assert torch.equal(namespace["values"], values[:4].float())
        assert namespace["latents"].shape == (4, info.latent_channels, 8, 8)
        assert namespace["table"]["label"].to_pylist() == labels[:4]
        if info.kind == "latents":
            assert torch.equal(namespace["latents"], values[:4].float() * info.scaling_factor)
        else:
            mean, std = values[:4].float().chunk(2, dim=1)
            noise = (namespace["latents"] / info.scaling_factor + info.shift_factor - mean) / std
            assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_finished_folder_is_checked_again_and_its_card_is_kept(made, tmp_path, capsys):
    argv = flags(made, tmp_path / "latents")
    precompute(*argv)
    (tmp_path / "latents" / "README.md").write_text("mine")
    before = contents(tmp_path / "latents")
    precompute(*argv)
    assert contents(tmp_path / "latents") == before and (tmp_path / "latents" / "README.md").read_text() == "mine"
    precompute("--verify", tmp_path / "latents")
    assert "5 shards with 29 records are as they were written" in capsys.readouterr().out

    first, second = (tmp_path / "latents" / "data" / f"train-0000{shard}-of-00005.arrow" for shard in range(2))
    shutil.copy(first, second)
    for again in (argv, ["--verify", tmp_path / "latents"]):
        with pytest.raises(ValueError, match="train-00001-of-00005.arrow, which has another SHA-256"):
            precompute(*again)


def test_other_settings_or_images_are_refused(made, tmp_path):
    precompute(*flags(made, tmp_path / "latents"))
    with pytest.raises(ValueError, match="batch_size: 3 there, 4 now; has_flipped: False there, True now"):
        precompute(*flags(made, tmp_path / "latents", "--flip", "--batch_size", 4))

    # One image more.
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images" / "ant" / "00.png", tmp_path / "images" / "ant" / "99.png")
    with pytest.raises(ValueError, match="labels_sha256: .*; num_images: 30 there, 31 now"):
        precompute(*flags(made, tmp_path / "latents", "--data", f"folder:{tmp_path / 'images'}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label_column", "class"], "Expected a column 'class'"),
        (
            ["--max_corrupt_images", 0],
            r"at most 0 unreadable images, got 1, the last .*image 19 \(bee/04.png\)",
        ),
        (["--resolution", 15], "multiple of the VAE's downsampling, got 15, which becomes 7"),
        (["--shard_size", 0], "Expected --shard_size >= 1, got 0"),
        (["--max_corrupt_images", -1], "Expected --max_corrupt_images >= 0, got -1"),
        (["--push_to_hub", "--hub_dataset_id", "latents"], 'Expected --hub_dataset_id "organisation/name"'),
        (["--pretrained_vae_name_or_path", "ant/vae"], "Expected a diffusers VAE with safetensors weights at ant/vae"),
        (["--num_classes", 1], "Expected num_classes >= 2"),
    ],
)
def test_what_cannot_be_encoded_is_one_clear_error_before_anything_is_finished(made, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        precompute(*flags(made, tmp_path / "latents", *more))
    assert not (tmp_path / "latents" / "latents.json").exists()


def test_needed_flags_are_asked_for_and_a_config_gives_them(made, tmp_path):
    with pytest.raises(ValueError, match="Expected --resolution, got none"):
        precompute("--data", "folder:photos")
    with pytest.raises(ValueError, match="Expected --pretrained_vae_name_or_path, got none"):
        precompute("--data", "folder:photos", "--resolution", "8")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"resolution": 8, "pretrained_vae_name_or_path": "vae", "flip": True}))
    for data in ("photos", "latents:photos", "hub:"):
        with pytest.raises(ValueError, match=f"Expected --data folder:PATH or hub:NAME, got '{data}'"):
            precompute("--config", config, "--data", data)
    args = parse_config(PrecomputeConfig, ["--config", str(config), "--no-flip", "--data", "folder:photos"])
    assert (args.resolution, args.flip, args.dtype, args.shard_size) == (8, False, "float16", 10_000)


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--hub_private"], True), (["--no-hub_private"], False), (["--hub_private", "False"], False),
     (["--config", '{"hub_private": true}'], True), (["--config={}", "--no-hub_private"], False)],
)  # fmt: skip
def test_a_switch_that_may_be_unset_is_still_a_switch(words, value):
    assert parse_config(PrecomputeConfig, [*words, "--verify", "latents"]).hub_private is value


def test_the_recipes_make_what_the_recipes_of_training_read():
    configs = [PrecomputeConfig(**settings) for settings in precompute_latents.RECIPES.values()]
    made = {(f"latents:{config.output_dir}", config.resolution, config.flip) for config in configs}
    recipes = [recipe.settings() for recipe in presets.RECIPES.values() if recipe.on_latents]
    assert made == {(recipe["data"], recipe["resolution"], recipe["random_flip"]) for recipe in recipes}
    with pytest.raises(ValueError, match="Expected a recipe among .*imagenet512.*got 'imagenet64'"):
        precompute("--recipe", "imagenet64")


def test_a_data_set_without_access_says_how_to_get_it(made, tmp_path, monkeypatch):
    """Offline for real; gated with the error that `datasets` raises (tests/hub asks a server)."""
    argv = flags(made, tmp_path / "latents") + ["--data", "hub:ILSVRC/imagenet-1k"]
    advice = "accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k.*`hf auth login`"
    with pytest.raises(ValueError, match=f"Couldn't reach 'ILSVRC/imagenet-1k' on the Hub.*{advice}"):
        precompute(*argv)

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=f"is a gated dataset on the Hub. If .*{advice}"):
        precompute(*argv)
