# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a routed text-to-image model from nothing, samples prompts that it never saw and judges it.

In a clone: `make demo-text`.

The images are scikit-learn's handwritten digits, tilted, in coloured ink on coloured paper, with captions that say so.
A fifth of the pairs of digit and ink are never trained on, such as a red zero. The demo makes a small VAE, a
byte-level tokenizer and a text encoder with random weights. examples/precompute_latents.py encodes images and
captions, and examples/train_text_to_image_tread.py trains the transformer; both are run unchanged. The training saves
a standard diffusers pipeline, which is then sampled.

A judge, a small network trained to recognise the four attributes in real images of all pairs, measures how often a
sample shows what its prompt says. The exit code is 1 if that is too rare. An interrupted run goes on where it stopped.

Shapes: B images, S their side, A the four attributes.
"""

import argparse
import copy
import itertools
import json
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusers_tread.installation import require


require("text", "accelerate", "datasets", "psutil", "tyro", "sklearn", "tokenizers", "transformers")

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusers_tread import GuidedPipeline, SparseGuidance, apply_token_routing
from diffusers_tread.demos.captioned_digits import (
    ATTRIBUTES,
    SIZE,
    draw,
    fit,
    recognise,
    save_folder,
    split_handwriting,
    to_floats,
    to_images,
    train_judge,
)
from diffusers_tread.files import whole
from diffusers_tread.metrics import PromptImages
from diffusers_tread.pictures import add_labels, caption_grid, save_image
from diffusers_tread.runs.signals import run_command, stopped_cleanly


TEXT_WIDTH, CAPTION_TOKENS = 64, 24
VAE_STEPS = 800
NUM_JUDGE_IMAGES, NUM_REAL_IMAGES = 8000, 2000  # images to train and to test the judge
REQUIRED = {"as trained on": 0.75, "never trained on": 0.65}
TRANSFORMER = {"in_channels": 4, "patch_size": 2, "context_in_dim": TEXT_WIDTH, "hidden_size": 96, "mlp_ratio": 2.0}
TRANSFORMER |= {"num_heads": 3, "depth": 10, "axes_dim": [16, 16]}
ROUTES = [{"start": 2, "end": -4}]
TRAINING = {
    "routes": json.dumps(ROUTES),
    "dense_fraction": 0.2,
    "objective_config": json.dumps({"shift": 3.0}),  # more noise levels at which the words decide the digit
    "train_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "adam_beta2": 0.99,
    "ema_decay": 0.998,
    "logging_steps": 50,
    "checkpoints_total_limit": 1,
}
# For each way of sampling: the scale of classifier-free guidance, or a guider.
SAMPLINGS = {
    "unguided": 1.0,
    "CFG 3": 3.0,
    "CFG 3 + Sparse": SparseGuidance(guidance_scale=3.0, strong_ratio=0.0, weak_ratio=0.5, null_weak_branch=True),
}
CFG = list(SAMPLINGS)[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/demo-text"), help="Images, parts, run, picture.")
    add("--num_train_images", type=int, default=8000, help="Images to train on.")
    add("--max_train_steps", type=int, default=1500, help="Optimiser steps of the training; 2500 are better.")
    add("--num_images", type=int, default=100, help="Samples to judge, per way of sampling and kind of prompt.")
    add("--num_inference_steps", type=int, default=20, help="Steps of the sampler.")
    args = parser.parse_args(argv)
    if args.num_images < 12:
        raise ValueError(f"Expected --num_images >= 12, which the picture shows, got {args.num_images}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    args = parse_args(argv)
    with stopped_cleanly(argv, kept="images, latents and checkpoints"):
        return run_demo(args)


def run_demo(args: argparse.Namespace) -> int:
    """Trains, samples and judges; returns the exit code."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # so small operators gain little from a second core

    # Images, pipeline, training.
    known, others = split_handwriting()
    pixels, _, captions = draw(args.num_train_images, known, is_seen=True, seed=1)
    save_folder(args.output_dir / "images", pixels, captions)
    if not (args.output_dir / "parts").exists():
        save_parts(args.output_dir / "parts", pixels, captions)
    encode(args)
    folder = train(args)

    # Judge. It learns from the same handwriting, in all pairs, and is tested on other handwriting.
    judge = train_judge(*draw(NUM_JUDGE_IMAGES, known, is_seen=None, seed=2)[:2])
    real_pixels, real_scenes, _ = draw(NUM_REAL_IMAGES, others, is_seen=None, seed=3)
    verdicts = {("real images", ""): recognise(judge, real_pixels) == real_scenes}

    # Sample.
    prompts = {kind: draw(args.num_images, known, is_seen=kind == "as trained on", seed=4)[1:] for kind in REQUIRED}
    samples = sample_all(args, folder, prompts)
    verdicts |= {key: recognise(judge, images) == prompts[key[0]][0] for key, images in samples.items()}

    # Report.
    picture = args.output_dir / "samples.png"
    save_picture(picture, prompts, samples)
    print_table(verdicts)
    print(f"Pipeline: {folder}   picture: {picture}   {time.perf_counter() - started:.0f} s in all")
    shares = {key: is_right.all(dim=1).float().mean().item() for key, is_right in verdicts.items()}
    passed = all(shares[kind, CFG] >= required for kind, required in REQUIRED.items())
    if not passed:
        print(f"FAILED: expected, with {CFG}, all four to be right in these shares: {REQUIRED}.")
    return 0 if passed else 1


# ------------------------------------------------------------------------------------------------- pipeline, training


def save_parts(folder: Path, pixels: torch.Tensor, captions: list[str]) -> None:
    """Saves a pipeline that only lacks a trained transformer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(captions)
    pipeline = PRXPipeline(
        vae=train_vae(pixels),
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        transformer=PRXTransformer2DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        default_sample_size=SIZE,
    )
    with whole(folder) as temporary:
        pipeline.save_pretrained(temporary)


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer on the captions; it can still spell any other word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    options = {"special_tokens": ["<pad>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1000, show_progress=False, **options))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=CAPTION_TOKENS
    )


def make_text_encoder(vocab_size: int) -> T5EncoderModel:
    """Makes a text encoder of one untrained layer, with position biases so large that a token sees its neighbours."""
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 2 * TEXT_WIDTH, "num_layers": 1, "num_heads": 4}
    encoder = T5EncoderModel(T5Config(vocab_size=vocab_size, dropout_rate=0.0, **sizes))
    nn.init.normal_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return encoder.eval()


def train_vae(pixels: torch.Tensor) -> AutoencoderKL:
    """Trains a VAE with latents [B, 4, S/4, S/4]."""
    # Train.
    vae = AutoencoderKL(
        block_out_channels=[16, 16, 32], down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=1, latent_channels=4, sample_size=SIZE,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip

    def loss(batch: torch.Tensor) -> torch.Tensor:
        images = to_floats(batch)
        posterior = vae.encode(images).latent_dist
        return F.l1_loss(vae.decode(posterior.sample()).sample, images) + 1e-5 * posterior.kl().mean()

    fit(vae, loss, pixels, name="VAE", num_steps=VAE_STEPS, batch_size=24, learning_rate=3e-3)

    # Scale the latents to about unit variance.
    with torch.no_grad():
        latents = vae.encode(to_floats(pixels[:1000])).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def encode(args: argparse.Namespace) -> None:
    """Encodes images and captions, once for all epochs."""
    folder = args.output_dir
    flags = {"data": f"folder:{folder / 'images'}", "output_dir": folder / "latents", "resolution": SIZE}
    flags |= {"pretrained_vae_name_or_path": folder / "parts" / "vae", "caption_column": "text"}
    flags |= {"pretrained_text_pipeline": folder / "parts", "cache_text_embeddings": True, "text_dtype": "float32"}
    run_task("precompute", **flags)


def train(args: argparse.Namespace) -> Path:
    """Trains; returns the folder of the finished pipeline."""
    run, parts = args.output_dir / "run", args.output_dir / "parts"
    flags = {"data": f"latents:{args.output_dir / 'latents'}", "output_dir": run, "use_ema": True}
    flags |= {"pretrained_model_name_or_path": parts, "transformer_config_name_or_path": parts / "transformer"}
    run_task("train-text", max_train_steps=args.max_train_steps, **flags, **TRAINING)
    return run / "pipeline"


def run_task(name: str, **flags) -> None:
    """Runs another example in its own process, with one thread. Raises SystemExit with its exit code if not 0."""
    command = [sys.executable, "-m", "diffusers_tread", name]
    command += [word for flag, value in flags.items() if value is not True for word in (f"--{flag}", str(value))]
    command += [f"--{flag}" for flag, value in flags.items() if value is True]
    print(f"$ {shlex.join(command)}", flush=True)
    run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


# ----------------------------------------------------------------------------------------------------------- samples


def sample_all(args: argparse.Namespace, folder: Path, prompts: dict) -> dict[tuple[str, str], torch.Tensor]:
    """Samples images [B, 3, S, S] uint8 for each kind of prompt and way of sampling, from the same noise."""
    keys, pipeline = list(itertools.product(prompts, SAMPLINGS)), DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def sample_one(key: tuple[str, str]) -> torch.Tensor:
        own = copy.deepcopy(pipeline)  # two run at a time, and a scheduler has a state
        return sample(own, prompts[key[0]][1], SAMPLINGS[key[1]], args.num_inference_steps)

    with ThreadPoolExecutor(max_workers=2) as pool:
        samples = tqdm(pool.map(sample_one, keys), desc="Sampling", total=len(keys), unit="way")
        return dict(zip(keys, samples, strict=True))


def sample(
    pipeline: DiffusionPipeline, prompts: list[str], guidance: float | SparseGuidance, num_steps: int
) -> torch.Tensor:
    """Samples images [B, 3, S, S] uint8. An image depends only on its prompt and its index, not on its batch."""
    options = {"num_inference_steps": num_steps, "call_options": {"use_resolution_binning": False}}
    if isinstance(guidance, SparseGuidance):
        apply_token_routing(pipeline.transformer, ROUTES)
        pipeline = GuidedPipeline(pipeline, guidance)
    else:
        options["guidance_scale"] = guidance
    images = PromptImages(pipeline, prompts, **options)
    starts = range(0, len(images), 25)
    return torch.cat([images.read(start, min(start + 25, len(images))) for start in starts])


# ------------------------------------------------------------------------------------------------------------- report


def print_table(verdicts: dict[tuple[str, str], torch.Tensor]) -> None:
    """Prints the shares of images that show what their prompts say, for each attribute and for all of them."""
    print(f"\n{'digit and ink':18} {'sampled':16}" + "".join(f"{name:>9}" for name in (*ATTRIBUTES, "all four")))
    for (kind, way), is_right in verdicts.items():
        shares = [*is_right.float().mean(dim=0).tolist(), is_right.all(dim=1).float().mean().item()]
        print(f"{kind:18} {way:16}" + "".join(f"{share:9.1%}" for share in shares))


def save_picture(path: Path, prompts: dict, samples: dict[tuple[str, str], torch.Tensor]) -> None:
    """Draws twelve samples with CFG and their prompts for each kind of prompt."""
    grids = []
    for kind, (_, captions) in prompts.items():
        grid = caption_grid(to_images(samples[kind, CFG][:12]), captions[:12], columns=6)
        grids.append(add_labels(grid, title=f"Pairs of digit and ink {kind}"))
    picture = PIL.Image.new("RGB", (grids[0].width, sum(grid.height for grid in grids)), "white")
    for index, grid in enumerate(grids):
        picture.paste(grid, (0, sum(other.height for other in grids[:index])))
    save_image(picture, path)


if __name__ == "__main__":
    sys.exit(main())
