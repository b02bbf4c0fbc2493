# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a routed transformer on handwritten digits, samples it in three ways and judges the samples.

In a clone: `make demo`.

It runs examples/train_tread.py unchanged, loads the pipeline that was saved, and ends with a table and a picture in
the output folder. The exit code is 1 if an SVM trained on real digits recognises fewer than 95 % of the samples,
unguided or with Sparse Guidance, or if the pipeline gives other images when it is loaded again. It takes about 4
minutes on two CPU cores. An interrupted run goes on where it stopped.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusers_tread.installation import require


require("train,eval", "accelerate", "datasets", "psutil", "tyro", "matplotlib", "sklearn")

import numpy as np
import torch
from diffusers import BaseGuidance
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tqdm.auto import tqdm

from diffusers_tread import (
    FlowMatchingObjective,
    SparseGuidance,
    TREADPipeline,
    TREADTransformer2DModel,
    token_routing,
)
from diffusers_tread.flops import flop_ceiling
from diffusers_tread.runs.signals import run_command, stopped_cleanly


NUM_CLASSES, SIZE = 10, 8
NUM_INFERENCE_STEPS = 20
REQUIRED_ACCURACY = 0.95
# For each way of sampling: the guider, and the scale of plain classifier-free guidance.
SAMPLINGS = {
    "dense, no guidance": (None, None),
    "classifier-free guidance 1.5": (None, 1.5),
    "Sparse Guidance 1.5, ratios 0.2/0.8": (
        SparseGuidance(guidance_scale=1.5, strong_ratio=0.2, weak_ratio=0.8),
        None,
    ),
}
UNGUIDED, _, SPARSE = SAMPLINGS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/demo"), help="Pipeline, picture, checkpoints."
    )
    parser.add_argument("--num_images", type=int, default=500, help="Samples to judge, per way of sampling.")
    parser.add_argument("--max_train_steps", type=int, default=2500, help="Optimiser steps of the training.")
    args = parser.parse_args(argv)
    if args.num_images < NUM_CLASSES or args.num_images % NUM_CLASSES:
        raise ValueError(f"Expected --num_images divisible by the {NUM_CLASSES} classes, got {args.num_images}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    args = parse_args(argv)
    with stopped_cleanly(argv, kept="checkpoints"):
        return run_demo(args)


def run_demo(args: argparse.Namespace) -> int:
    """Trains, samples and judges; returns the exit code."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # so small operators gain little from a second core, and lose much if it is busy

    # Train.
    folder = train(args.output_dir, args.max_train_steps)

    # Sample and judge.
    judge, real, real_accuracy = train_judge()
    labels = np.arange(args.num_images) % NUM_CLASSES
    images = sample_all_ways(folder, labels)
    accuracies = {name: judge.score(flatten(samples), labels) for name, samples in images.items()}

    # Load once more.
    pipeline = load_pipeline(folder)
    again = sample(pipeline, labels[:100], *SAMPLINGS[SPARSE])
    is_same = np.array_equal(again, images[SPARSE][:100])

    # Report.
    routed_time, dense_time = step_times(pipeline.transformer)
    ceiling = flop_ceiling(pipeline.transformer)
    picture = args.output_dir / "samples.png"
    save_picture(picture, real, images, real_accuracy, accuracies)

    print(f"\n{args.num_images} samples each, {NUM_INFERENCE_STEPS} Euler steps, recognised by an SVM of real digits")
    print(f"{'':36} {'recognised':>10}   change of a pixel against unguided")
    print(f"{'real digits that it had not seen':36} {real_accuracy:10.1%}")
    for name, accuracy in accuracies.items():
        change = np.abs(images[name].astype(float) - images[UNGUIDED]).mean()
        print(f"{name:36} {accuracy:10.1%}   {change:.1f} of 255")
    print(
        "Expect little from Sparse Guidance on so small a problem: what a model trained with routing predicts here "
        "barely depends on the ratio.\n"
    )
    print(
        f"Training step: dense {dense_time * 1e3:.1f} ms, routed {routed_time * 1e3:.1f} ms (medians, this machine)."
    )
    print(f"Dense/routed {dense_time / routed_time:.2f}, FLOP ceiling {ceiling:.2f}.")
    print(f"Same images from the pipeline loaded once more: {'yes' if is_same else 'NO'}.")
    print(f"Pipeline: {folder}   picture: {picture}   {time.perf_counter() - started:.0f} s in all")

    passed = is_same and min(accuracies[UNGUIDED], accuracies[SPARSE]) >= REQUIRED_ACCURACY
    if not passed:
        print(f"FAILED: expected the same images, and {REQUIRED_ACCURACY:.0%} unguided and with Sparse Guidance.")
    return 0 if passed else 1


def train(output_dir: Path, max_train_steps: int) -> Path:
    """Runs the training script's digits recipe in its own process; returns the folder of the pipeline."""
    command = [sys.executable, "-m", "diffusers_tread", "train", "--output_dir", str(output_dir)]
    command += ["--max_train_steps", str(max_train_steps)]
    print(f"$ {shlex.join(command)}", flush=True)
    run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return output_dir / "pipeline"


def load_pipeline(folder: Path) -> TREADPipeline:
    pipeline = TREADPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_judge() -> tuple[SVC, np.ndarray, float]:
    """Trains an SVM on the real digits.

    Returns:
        The SVM, eight digits of each class [8, 10, 8, 8], and the accuracy on held-out digits.
    """
    digits = load_digits()
    pixels = np.rint(digits.images / 16 * 255).astype(np.uint8)  # B 8 8
    shown = np.stack([pixels[digits.target == digit][:8] for digit in range(NUM_CLASSES)], axis=1)  # 8 10 8 8

    # scikit-learn's settings for these digits: gamma 0.001 for pixels in [0, 16], here in [0, 1].
    judge = SVC(kernel="rbf", gamma=0.001 * 16**2)
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        flatten(pixels), digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    accuracy = judge.fit(seen, seen_labels).score(held_out, held_out_labels)
    return judge.fit(flatten(pixels), digits.target), shown, accuracy


def flatten(images: np.ndarray) -> np.ndarray:
    """Converts images [B, 8, 8] uint8 to [B, 64] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def sample_all_ways(folder: Path, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Samples images in each way, two ways at a time, the slowest first, each with a pipeline of its own."""
    order = sorted(SAMPLINGS, key=lambda name: name == UNGUIDED)
    pipelines = [load_pipeline(folder) for _ in order]  # one after the other: diffusers does not load in threads
    progress = tqdm(total=len(order) * len(labels), desc="Sampling", unit="image")
    with ThreadPoolExecutor(max_workers=2) as pool, progress:
        samples = pool.map(
            lambda name, pipeline: sample(pipeline, labels, *SAMPLINGS[name], progress=progress), order, pipelines
        )
        images = dict(zip(order, samples, strict=True))
    return {name: images[name] for name in SAMPLINGS}


def sample(
    pipeline: TREADPipeline,
    labels: np.ndarray,
    guider: BaseGuidance | None,
    guidance_scale: float | None,
    *,
    first_seed: int = 0,
    progress: tqdm | None = None,
) -> np.ndarray:
    """Samples images [B, 8, 8] uint8. Image i depends only on the seed `first_seed` + i, not on its batch."""
    pipeline.guider = guider
    batches = []
    for start in range(0, len(labels), 25):
        batch = labels[start : start + 25].tolist()
        images = pipeline(
            class_labels=batch,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(first_seed + start + index) for index in range(len(batch))],
            output_type="np",
        ).images
        batches.append(np.rint(images[..., 0] * 255).astype(np.uint8))
        if progress is not None:
            progress.update(len(batch))
    return np.concatenate(batches)


def step_times(transformer: TREADTransformer2DModel) -> tuple[float, float]:
    """Measures the median seconds of routed and dense training steps, alternating, on a new model of this size."""
    batch_size, num_warmups, num_repeats = 16, 3, 20
    model = TREADTransformer2DModel.from_config(transformer.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    objective = FlowMatchingObjective()
    latents, labels = torch.randn(batch_size, 1, SIZE, SIZE), torch.arange(batch_size) % NUM_CLASSES

    times = {True: [], False: []}
    for repeat in range(num_warmups + num_repeats):
        for routed in times:
            with token_routing(model, enabled=routed):
                start = time.perf_counter()
                objective.loss(model, latents, class_labels=labels).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if repeat >= num_warmups:
                    times[routed].append(time.perf_counter() - start)
    return statistics.median(times[True]), statistics.median(times[False])


def save_picture(
    path: Path,
    real: np.ndarray,
    images: dict[str, np.ndarray],
    real_accuracy: float,
    accuracies: dict[str, float],
) -> None:
    """Draws real digits and the samples of each way side by side, with a column per class."""
    panels = {f"real digits\n{real_accuracy:.1%} recognised": real}
    for name, samples in images.items():
        shown = samples[: 8 * NUM_CLASSES].reshape(-1, NUM_CLASSES, SIZE, SIZE)
        panels[f"{name}\n{accuracies[name]:.1%} recognised"] = shown

    figure = Figure(figsize=(16, 4), layout="constrained")
    for axis, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        framed = np.pad(panel, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=96)  # 8 10 10 10
        axis.imshow(framed.transpose(0, 2, 1, 3).reshape(-1, 10 * NUM_CLASSES), cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=13)
        axis.set_axis_off()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
