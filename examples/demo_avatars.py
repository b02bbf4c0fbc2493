# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a routed transformer on small avatars of twenty classes, samples and judges it.

In a clone: `make demo-avatars`.

It runs examples/make_avatars.py, train_tread.py and sample.py unchanged, and ends with a table, a picture of the
samples and one of the training's progress in the output folder. The judge is a small network that learns the classes
from avatars of other seeds. Fréchet distances are measured in its features, to as many avatars that neither it nor the
model has seen. The exit code is 1 if it recognises fewer than 85 % of the samples, unguided or with Sparse Guidance.
An interrupted run goes on where it stopped.

Shapes: B images, S their side, K classes.
"""

import argparse
import json
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from diffusers_tread.installation import require


require("train,eval,avatars", "accelerate", "datasets", "psutil", "tyro", "dicebear", "dicebear_styles", "resvg_py")

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from diffusers_tread.metrics import FeatureStatistics, frechet_distance
from diffusers_tread.pictures import add_labels, make_grid, save_image
from diffusers_tread.runs.signals import run_command, stopped_cleanly


SIZE, ZOOM = 16, 5  # side of an avatar in pixels; how often each pixel is repeated in the pictures
NUM_CLASSES, COLUMNS = 20, 10  # columns of the pictures and of the training's grids
REQUIRED_ACCURACY = 0.85
MODEL = {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 12, "patch_size": 2}
TRAINING = {
    "resolution": SIZE,
    "model_config_name_or_path": json.dumps(MODEL),
    "train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "adam_beta2": 0.99,
    "ema_decay": 0.998,
    "logging_steps": 50,
}
# For each way of sampling: the flags of examples/sample.py.
SAMPLINGS = {
    "unguided": {"guidance": "none"},
    "CFG 1.5": {"guidance": "cfg", "guidance_scale": 1.5},
    "Sparse 1.5": {"guidance": "sparse", "guidance_scale": 1.5, "strong_ratio": 0.2, "weak_ratio": 0.8},
}
UNGUIDED, _, SPARSE = SAMPLINGS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/demo-avatars"), help="Avatars, run, samples, pictures.")
    add("--num_train_images", type=int, default=8000, help="Avatars to train on.")
    add("--num_judge_images", type=int, default=4000, help="Others: half for the judge, half to compare with.")
    add("--max_train_steps", type=int, default=3000, help="Optimiser steps of the training.")
    add("--num_images", type=int, default=400, help="Samples to judge, per way of sampling; the classes take turns.")
    add("--num_inference_steps", type=int, default=20, help="Steps of the sampler.")
    add("--judge_steps", type=int, default=400, help="Optimiser steps of the judge.")
    args = parser.parse_args(argv)
    for name in ("num_train_images", "num_images"):
        if getattr(args, name) < 40:
            raise ValueError(f"Expected --{name} >= 40, two of each class, got {getattr(args, name)}.")
    if args.num_judge_images < 80:
        raise ValueError(f"Expected --num_judge_images >= 80, twice two of each class, got {args.num_judge_images}.")
    if args.num_train_images < args.num_images:
        raise ValueError(
            f"Expected --num_train_images >= --num_images, for as many real ones, got {args.num_train_images} and "
            f"{args.num_images}."
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    args = parse_args(argv)
    with stopped_cleanly(argv, kept="avatars, checkpoints and samples"):
        return run_demo(args)


def run_demo(args: argparse.Namespace) -> int:
    """Trains, samples and judges; returns the exit code."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the samplings run two at a time; the operators are small

    # Draw, train, sample.
    train, other = (
        draw(args, split, count)
        for split, count in {"train": args.num_train_images, "reference": args.num_judge_images}.items()
    )
    run = train_model(args)
    samples = sample_all_ways(args, run / "pipeline", train.names)

    # Judge. It learns from half of the other avatars and compares with the other half; the row "real" shows what
    # samples should reach.
    half = args.num_judge_images // 2
    judge = Judge(other[:half], heldout=other[half:], num_steps=args.judge_steps)
    rows = {"real": train[: args.num_images], **samples}
    verdicts = {name: judge(images) for name, images in rows.items()}

    # Report.
    pictures = [args.output_dir / "samples.png", args.output_dir / "along_training.png"]
    save_samples(pictures[0], rows)
    save_course(pictures[1], run / "samples", train)
    print(
        f"\n{args.num_images} images each, {args.num_inference_steps} Euler steps; the judge learnt from {half} others"
    )
    print(f"{'':12} {'recognised':>10} {'worst class':>22} {'Fréchet distance':>17}")
    for name, verdict in verdicts.items():
        worst = f"{train.names[verdict.worst_class]} {verdict.worst_accuracy:.0%}"
        print(f"{name:12} {verdict.accuracy:10.1%} {worst:>22} {verdict.distance:17.2f}")
    print(f"Pipeline: {run / 'pipeline'}   pictures: {', '.join(map(str, pictures))}")
    print(f"{time.perf_counter() - started:.0f} s in all")

    passed = min(verdicts[name].accuracy for name in (UNGUIDED, SPARSE)) >= REQUIRED_ACCURACY
    if not passed:
        print(f"FAILED: expected {REQUIRED_ACCURACY:.0%} to be recognised, unguided and with Sparse Guidance.")
    return 0 if passed else 1


# ------------------------------------------------------------------------------------------------ the other scripts


def run_task(name: str, **flags) -> None:
    """Runs another example in its own process, with one thread. Raises SystemExit with its exit code if not 0."""
    command = [sys.executable, "-m", "diffusers_tread", name]
    command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value)) if value is not True]
    command += [f"--{flag}" for flag, value in flags.items() if value is True]
    print(f"$ {shlex.join(command)}", flush=True)
    run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


@dataclass(frozen=True)
class Images:
    """Images with labels."""

    pixels: torch.Tensor
    """Pixels, [B, 3, S, S] uint8."""
    labels: torch.Tensor
    """Class of each image, [B]."""
    names: list[str]
    """Names of the K classes."""

    def of_each_class(self, turn: int) -> list[PIL.Image.Image]:
        """The image number `turn` of each class, for images that cycle through the classes."""
        chosen = self.pixels[turn * NUM_CLASSES : (turn + 1) * NUM_CLASSES].permute(0, 2, 3, 1)  # K S S 3
        return [PIL.Image.fromarray(pixels) for pixels in chosen.numpy()]

    def __getitem__(self, chosen: slice) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen], self.names)


def read_images(paths: list[Path], labels: list[int], names: list[str]) -> Images:
    pixels = np.stack([np.asarray(PIL.Image.open(path).convert("RGB")) for path in paths])  # B S S 3
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels), names)


def draw(args: argparse.Namespace, split: str, num_images: int) -> Images:
    """Draws the avatars of a split, cycling through the classes."""
    folder = args.output_dir / "avatars" / split
    run_task("make-avatars", num_images=num_images, resolution=SIZE, split=split, output_dir=folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    names = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["styles"]
    return read_images([folder / line["file_name"] for line in lines], [line["label"] for line in lines], names)


def train_model(args: argparse.Namespace) -> Path:
    """Trains, with a sample grid of each class after each eighth of the run; returns the run's folder."""
    every, run = max(args.max_train_steps // 8, 1), args.output_dir / "run"
    options = TRAINING | {"max_train_steps": args.max_train_steps, "output_dir": run, "use_ema": True}
    options |= {"checkpointing_steps": every, "checkpoints_total_limit": 1, "validation_steps": every}
    run_task("train", data=f"folder:{args.output_dir / 'avatars' / 'train'}", **options)
    return run


def sample_all_ways(args: argparse.Namespace, pipeline: Path, names: list[str]) -> dict[str, Images]:
    """Samples images in each way from the same noise, two ways at a time."""
    options = {"pretrained_pipeline": pipeline, "num_samples": args.num_images, "batch_size": 25}
    options["num_inference_steps"] = args.num_inference_steps
    labels = [index % NUM_CLASSES for index in range(args.num_images)]

    def sample(name: str) -> Images:
        folder = args.output_dir / "samples" / name.lower().replace(" ", "-")
        run_task("sample", output_dir=folder, **options, **SAMPLINGS[name])
        paths = [folder / "images" / f"{index:06d}.png" for index in range(args.num_images)]
        return read_images(paths, labels, names)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SAMPLINGS, pool.map(sample, SAMPLINGS), strict=True))


# -------------------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True, kw_only=True)
class Verdict:
    accuracy: float
    """Share of images that are recognised as their label."""
    worst_class: int
    worst_accuracy: float
    """Accuracy of the class that is recognised least."""
    distance: float
    """Fréchet distance to the held-out images."""


class Judge:
    """A small convolutional network with 64 features before its last layer.

    Args:
        images: Images to learn from.
        heldout: Images to compare with.
        num_steps: Optimiser steps.
    """

    def __init__(self, images: Images, *, heldout: Images, num_steps: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = make_network()
            order = torch.randint(len(images.labels), (num_steps, 128))
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / num_steps)))
        for chosen in tqdm(order, desc="Training the judge"):
            F.cross_entropy(self.network(to_floats(images.pixels[chosen])), images.labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.network.eval().requires_grad_(False)
        self.reference = FeatureStatistics.from_features(self.features(heldout))

    def features(self, images: Images) -> torch.Tensor:
        """[B, 64]."""
        return torch.cat([self.network[:-1](to_floats(batch)) for batch in images.pixels.split(500)])

    def __call__(self, images: Images) -> Verdict:
        features = self.features(images)
        is_right = (self.network[-1](features).argmax(dim=1) == images.labels).float()  # B
        by_class = [is_right[images.labels == label].mean().item() for label in range(NUM_CLASSES)]
        return Verdict(
            accuracy=is_right.mean().item(),
            worst_class=int(np.argmin(by_class)),
            worst_accuracy=min(by_class),
            distance=frechet_distance(FeatureStatistics.from_features(features), self.reference),
        )


def to_floats(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def make_network() -> nn.Sequential:
    layers, channels = [], 3
    for out_channels, stride in ((32, 1), (64, 2), (128, 2)):
        layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1))
        layers += [nn.GroupNorm(8, out_channels), nn.GELU()]
        channels = out_channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 64), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(64, NUM_CLASSES))


# ----------------------------------------------------------------------------------------------------- the pictures


def save_samples(path: Path, ways: dict[str, Images]) -> None:
    """Two images of each class for each way of sampling, from the same noise in every way."""
    rows = [
        (name if turn == 0 else "", images.of_each_class(turn)) for name, images in ways.items() for turn in (0, 1)
    ]
    save_image(make_sheet(rows, next(iter(ways.values())).names), path)


def save_course(path: Path, grids: Path, real: Images) -> None:
    """Draws the training's own grids, a row each, from the first to the last, and a row of real images."""
    rows = [(f"step {int(grid.stem.split('-')[1]):,}", cut_grid(grid)) for grid in sorted(grids.glob("step-*.png"))]
    save_image(make_sheet([*rows, ("real", real.of_each_class(0))], real.names), path)


def cut_grid(path: Path) -> list[PIL.Image.Image]:
    """Cuts out the images of a grid of two rows with texts on its left."""
    grid = PIL.Image.open(path).convert("RGB")
    side = grid.height // 2  # with a frame of one pixel
    corners = [
        (grid.width + (column - COLUMNS) * side + 1, row * side + 1) for row in (0, 1) for column in range(COLUMNS)
    ]
    cells = [grid.crop((left, top, left + side - 2, top + side - 2)) for left, top in corners]
    return [cell.resize((SIZE, SIZE), PIL.Image.Resampling.NEAREST) for cell in cells]


def make_sheet(rows: list[tuple[str, list[PIL.Image.Image]]], names: list[str]) -> PIL.Image.Image:
    """Draws rows of enlarged images with titles: ten classes under their names, and the other ten below."""
    halves = []
    for start in range(0, len(names), COLUMNS):
        images = [image for _, images in rows for image in images[start : start + COLUMNS]]
        grid = make_grid([image.resize([ZOOM * SIZE] * 2, PIL.Image.Resampling.NEAREST) for image in images])
        halves.append(add_labels(grid, rows=[title for title, _ in rows], columns=names[start : start + COLUMNS]))
    sheet = PIL.Image.new("RGB", (halves[0].width, sum(half.height for half in halves)), "white")
    for index, half in enumerate(halves):
        sheet.paste(half, (0, index * half.height))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
