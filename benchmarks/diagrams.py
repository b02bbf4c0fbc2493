# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Draws what routing and Sparse Guidance do, as routing.png and sparse_guidance.png.

    OMP_NUM_THREADS=1 python benchmarks/diagrams.py --output_dir docs/images

All that is drawn comes from forwards of a small routed model: which tokens are kept, how much a block changes each of
them, and what is predicted. If there is none in --pipeline yet, one is trained on avatars, which takes some minutes on
one core and needs the packages dicebear-core, dicebear-styles and resvg-py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import write_whole
from convergence_data import Images, draw_avatars
from diagrams_draw import draw_guidance, draw_routing, to_png
from diagrams_forwards import guided_step, routed_forward
from tqdm.auto import tqdm

from diffusers_tread import FlowMatchingObjective, TREADPipeline, TREADTransformer2DModel


NUM_INFERENCE_STEPS = 20
SIZE, PATCH_SIZE = 32, 4  # 8 x 8 tokens


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/diagrams"), help="Where the two pictures go.")
    add("--pipeline", type=Path, default=Path("outputs/diagrams/pipeline"), help="Trained and saved if not there.")
    add("--classes", default="critters,moods,thumbs,clay", help="Styles of avatars to train on, with commas between.")
    add("--images_per_class", type=int, default=12, help="Avatars of each.")
    add("--steps", type=int, default=600, help="Optimiser steps.")
    add("--label", type=int, default=0, help="The class that is shown.")
    add("--time", type=float, default=0.3, help="Noise of the routed image, in (0, 1).")
    add("--step", type=int, default=4, help=f"The step of sampling that is shown, of {NUM_INFERENCE_STEPS}.")
    add("--guidance_scale", type=float, default=4.0, help="Of Sparse Guidance with ratios 0.2 and 0.8.")
    add("--seed", type=int, default=0, help="Of weights, noise and subsets.")
    args = parser.parse_args(argv)

    args.classes = args.classes.split(",")
    if not 0 <= args.label < len(args.classes):
        raise ValueError(f"Expected --label in [0, {len(args.classes)}), got {args.label}.")
    if not 0 < args.time < 1:
        raise ValueError(f"Expected --time in (0, 1), got {args.time}.")
    if not 0 <= args.step < NUM_INFERENCE_STEPS:
        raise ValueError(f"Expected --step in [0, {NUM_INFERENCE_STEPS}), got {args.step}.")
    return args


def train(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor) -> TREADPipeline:
    """A small pixel model, routed as in the paper: 12 blocks, half of the tokens skip blocks 2 to 8."""
    torch.manual_seed(args.seed)
    model = TREADTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=3,
        sample_size=SIZE,
        patch_size=PATCH_SIZE,
        num_classes=len(args.classes),
        objective="flow",
    ).train()
    objective, batch_size = FlowMatchingObjective(), 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30, (args.steps - step) / (0.4 * args.steps))
    )
    for _ in tqdm(range(args.steps), desc="Training"):
        batch = torch.randint(len(images), (batch_size,))
        objective.loss(model, images[batch], class_labels=labels[batch]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    names = dict(enumerate(args.classes))
    return TREADPipeline(model.eval(), objective.scheduler(), id2label=names)


def read_images(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 3, H, W] in [-1, 1] and labels [N]."""
    drawn: Images = draw_avatars(
        num_train=args.images_per_class * len(args.classes), num_heldout=len(args.classes), size=SIZE,
        styles=args.classes,
    )  # fmt: skip
    return torch.from_numpy(drawn.train_images).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(drawn.train_labels)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, labels = read_images(args)
    if not args.pipeline.exists():
        train(args, images, labels).save_pretrained(args.pipeline)
    pipeline = TREADPipeline.from_pretrained(args.pipeline)

    image = images[labels == args.label][0]
    forward = routed_forward(pipeline.transformer, image, args.label, time=args.time, seed=args.seed)
    step = guided_step(
        pipeline,
        args.label,
        guidance_scale=args.guidance_scale,
        step=args.step,
        num_steps=NUM_INFERENCE_STEPS,
        seed=args.seed,
    )
    figures: dict[str, Any] = {"routing": draw_routing(forward), "sparse_guidance": draw_guidance(step)}
    for name, figure in figures.items():
        write_whole(args.output_dir / f"{name}.png", to_png(figure))


if __name__ == "__main__":
    sys.exit(main())
