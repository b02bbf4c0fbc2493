# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""examples/precompute_latents.py on images with captions: their embeddings and aspect-ratio buckets."""

import json
import re
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from runs import call, files_of, interrupting
from tiny_models import cut_off, save_vae

from diffusers_tread.data import LatentsInfo, center_crop, encode_moments, image_to_tensor, open_source
from diffusers_tread.data.captions import parse_caption_columns
from diffusers_tread.runs.latents import load_prompt_encoder


datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
import precompute_latents  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402


pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.filterwarnings("ignore")]
precompute = partial(call, precompute_latents)
SIZES = ((16, 16), (12, 20), (20, 12))  # of the images in turn, one of which cannot be read
DAMAGED = 4
BUCKETS = "16,16;12,20;20,12"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """11 images of three sizes with two captions each, a tiny VAE and a tiny pipeline."""
    root = tmp_path_factory.mktemp("made")
    (root / "images").mkdir()
    random, lines = np.random.RandomState(0), []
    for index in range(11):
        pixels = random.randint(0, 256, (*SIZES[index % 3], 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(root / "images" / f"{index:02d}.png")
        long = " ".join("a red square blue a red square".split()[: 1 + 2 * (index % 4)])  # one word of four fits
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "long": long, "short": f"a {index}"}))
    cut_off(root / "images" / f"{DAMAGED:02d}.png")
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    save_vae(root / "vae", latent_channels=4)
    torch.manual_seed(0)
    PIPELINES["flux"](root / "parts").save_pretrained(root / "pipeline")
    return root


def flags(made, output_dir, *more):
    return [
        *("--data", f"folder:{made / 'images'}", "--pretrained_vae_name_or_path", made / "vae"),
        *("--output_dir", output_dir, "--cache_dir", made / "cache", "--shard_size", 3, "--batch_size", 2),
        *("--caption_column", "long:0.5,short:0.5", *more),
    ]


def encoded(made):
    text = ("--cache_text_embeddings", "--pretrained_text_pipeline", made / "pipeline", "--max_sequence_length", 8)
    return *text, "--aspect_ratio_buckets", BUCKETS


def contents(folder):
    return {name: content for name, content in files_of(folder).items() if name != "README.md"}


def test_captions_their_embeddings_and_buckets_are_stored_and_trained_from(made, tmp_path, capsys, monkeypatch):
    argv = flags(made, tmp_path / "latents", *encoded(made), "--flip")
    precompute(*argv)
    said = capsys.readouterr().out
    assert "Text takes about" in said and "8 of 22 captions are longer" in said
    info, encoder = LatentsInfo.load(tmp_path / "latents"), load_prompt_encoder(
        str(made / "pipeline"), dtype="bfloat16", max_sequence_length=8
    )  # fmt: skip
    assert encoder.pipeline.transformer is encoder.pipeline.vae is None
    assert info.text.encoder == encoder.identity() and {a["dtype"] for a in info.text.arrays.values()} == {"bfloat16"}
    assert info.unreadable == ("image 4 (images/04.png)",) and info.num_samples == 10
    assert info.sizes == SIZES and [shard["latent_size"] for shard in info.shards] == [
        [8, 8], [8, 8], [6, 10], [6, 10], [10, 6],
    ]  # fmt: skip

    # As the card says.
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "latents" / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exec(snippet.replace('"latents"', repr(str(tmp_path / "latents"))), namespace := {})
    assert namespace["latents"].shape == (1, 4, 8, 8) and namespace["table"]["short"].to_pylist() == ["a 0"]

    # What a training gets, against the encoders called by hand.
    columns = parse_caption_columns("short")
    source = open_source(f"latents:{tmp_path / 'latents'}", captions=columns, random_flip=True)
    assert source.has_captions and source.num_classes == 0 and source.sizes == SIZES and source.latent_size == 10
    assert torch.equal(source.empty_text["0"], encoder.encode([""])[0]["0"])
    vae, seen = AutoencoderKL.from_pretrained(made / "vae"), set()
    for batch in islice(source.batches(batch_size=1, seed=0), 40):
        (caption,), (text,) = (source.conditions(batch)[name] for name in ("captions", "text"))
        (direct,) = encoder.encode([caption])
        index = int(caption.split()[-1])
        for name, values in text.items():
            torch.testing.assert_close(values, direct[name], atol=0.05, rtol=0.05)  # encoded with another, in bfloat16
        image = image_to_tensor(center_crop(PIL.Image.open(made / "images" / f"{index:02d}.png"), SIZES[index % 3]))
        moments = encode_moments(vae, torch.stack([image, image.flip(-1)]))
        assert min((batch["moments"][0].float() - expected).abs().max() for expected in moments) < 2e-3
        seen.add(index)
    assert len(seen) == 10


def test_a_killed_run_goes_on_with_the_same_bytes(made, tmp_path):
    argv = flags(made, tmp_path / "whole", *encoded(made))
    precompute(*argv)
    argv = flags(made, tmp_path / "killed", *encoded(made))
    with interrupting(precompute_latents.LatentsWriter, "write", lambda writer, shard, batches: shard == 3):
        precompute(*argv)
    assert (tmp_path / "killed" / "unfinished").exists()
    precompute(*argv)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    with pytest.raises(ValueError, match="text.encoder.max_sequence_length: 8 there, 7 now"):
        precompute(*argv, "--max_sequence_length", 7)


def test_captions_alone_need_neither_labels_nor_encoders(made, tmp_path):
    precompute(*flags(made, tmp_path / "latents", "--resolution", 16))
    info = LatentsInfo.load(tmp_path / "latents")
    assert info.captions == ("long", "short") and info.text is None and info.id2label == {} and info.latent_sizes == ()
    source = open_source(f"latents:{tmp_path / 'latents'}", captions=parse_caption_columns("long:0.5,short:0.5"))
    batch = next(source.batches(batch_size=4, seed=0))
    assert batch["moments"].shape == (4, 8, 8, 8) and source.conditions(batch) == {"captions": batch["captions"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution", 16, "--caption_column", "alt"], "Expected a caption column 'alt'"),
        (["--resolution", 16, "--cache_text_embeddings"], "--pretrained_text_pipeline with --cache_text_embeddings"),
        (["--resolution", 16, "--max_sequence_length", 8], "Expected --cache_text_embeddings"),
        (["--resolution", 16, "--aspect_ratio_buckets", "16,16"], "Expected --resolution or --aspect_ratio_buckets"),
        (["--aspect_ratio_buckets", "15,16"], "multiple of the VAE's downsampling, got 15"),
        (["--aspect_ratio_buckets", "16,16;8,80"], "Expected images in every aspect-ratio bucket.*0 of 8x80"),
    ],
)
def test_what_cannot_be_stored_is_one_clear_error(made, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        precompute(*flags(made, tmp_path / "latents", *more))
    assert not (tmp_path / "latents").exists()
