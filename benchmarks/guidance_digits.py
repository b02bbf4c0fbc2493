# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples handwritten digits with every kind of guidance and compares the samples with digits nobody trained on.

    OMP_NUM_THREADS=1 python benchmarks/guidance_digits.py --output benchmarks/results/guidance_digits.json \\
        --plot docs/images/guidance_digits.png

examples/train_tread.py trains the model of examples/demo.py on three quarters of the digits; the weak model of
autoguidance is an early checkpoint of the same run. For each kind and guidance scale it reports the share of samples
that an SVM trained on real digits recognises, the Fréchet distance to the held-out digits, of pixels and of a small
network's features, and the FLOPs. Image i of a seed starts from the same noise in every row. An interrupted run goes
on.
"""

import argparse
import copy
import hashlib
import io
import json
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from common import hardware, source_state, versions, write_whole
from diffusers import BaseGuidance, ClassifierFreeGuidance
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo  # noqa: E402
import train_tread  # noqa: E402

from diffusers_tread import RatioSchedule, SparseGuidance, TREADPipeline, TREADTransformer2DModel  # noqa: E402
from diffusers_tread.data import (  # noqa: E402
    SOURCES,
    DigitsDataset,  # noqa: E402
    TrainingSource,
    register_source,
)
from diffusers_tread.flops import guidance_flops  # noqa: E402
from diffusers_tread.metrics import FeatureStatistics, frechet_distance  # noqa: E402
from diffusers_tread.runs.checkpoints import EMA_WEIGHTS  # noqa: E402


# Per kind what makes its guider of a guidance scale, and the scales. A schedule's first ratio is that of the noisiest
# step. Sparse Guidance alone changes little here, hence its larger scale.
KINDS = {
    "CFG": (ClassifierFreeGuidance, (1.1, 1.5)),
    "CFG, middle half of the steps": (partial(ClassifierFreeGuidance, start=0.25, stop=0.75), (1.5,)),
    "SG, ratios 0.2/0.8": (partial(SparseGuidance, strong_ratio=0.2, weak_ratio=0.8), (4.0,)),
    "SG, ratios 0.5/0.9": (partial(SparseGuidance.from_preset, "flops"), (4.0,)),
    "SG, ratios 0.1/0.8 to 0.4 on a line": (
        partial(SparseGuidance, strong_ratio=0.1, weak_ratio=RatioSchedule(first=0.8, last=0.4, shape="linear")),
        (4.0,),
    ),
    "CFG + SG, ratios 0.2/0.8": (
        partial(SparseGuidance, strong_ratio=0.2, weak_ratio=0.8, null_weak_branch=True),
        (1.5,),
    ),
    "AG": (partial(SparseGuidance, strong_ratio=0.0, weak_ratio=0.0, weak_checkpoint=True), (1.1, 1.5)),
    "AG + SG, ratios 0/0.75": (
        partial(SparseGuidance, strong_ratio=0.0, weak_ratio=0.75, weak_checkpoint=True),
        (1.5,),
    ),
    "AG + SG, the preset fid": (partial(SparseGuidance.from_preset, "fid"), (1.5,)),
}
UNGUIDED, REAL = "no guidance", "real digits of the training"
METRICS = {
    "accuracy": "recognised",
    "pixel_distance": "Fréchet distance of pixels",
    "feature_distance": "Fréchet distance of features",
}
SHOWN = (UNGUIDED, "CFG", "SG, ratios 0.2/0.8", "AG", "AG + SG, the preset fid")  # in the picture, at the larger scale


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/guidance_digits"), help="Checkpoints and pipeline.")
    add("--max_train_steps", type=int, default=2500, help="Optimiser steps of the training.")
    add("--weak_steps", type=int, default=300, help="Steps after which the weak model was saved.")
    add("--num_images", type=int, default=500, help="Samples per row and seed.")
    add("--seeds", type=int, default=3, help="Independent sets of samples, at least 2.")
    add("--workers", type=int, default=2, help="Threads that sample, with a pipeline each.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    add("--plot", type=Path, help="PNG file to write; by default none.")
    args = parser.parse_args(argv)

    if not 1 <= args.weak_steps < args.max_train_steps:
        raise ValueError(
            f"Expected --weak_steps in [1, {args.max_train_steps}), before the training's end, got {args.weak_steps}."
        )
    if not 10 <= args.num_images <= 1340 or args.num_images % demo.NUM_CLASSES:
        raise ValueError(
            f"Expected --num_images divisible by the {demo.NUM_CLASSES} classes, in [10, 1340] because as many real "
            f"digits are drawn for comparison, got {args.num_images}."
        )
    if args.seeds < 2 or args.workers < 1:
        raise ValueError(f"Expected --seeds >= 2 and --workers >= 1, got {args.seeds} and {args.workers}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, samples and judges; returns what it writes."""
    args, started = parse_args(argv), datetime.now(timezone.utc).isoformat(timespec="seconds")
    source = source_state()  # now: it may change while this runs
    torch.set_num_threads(1)  # per worker
    train(args)
    judge = Judge()
    pipeline = load_pipeline(args)

    # Sample.
    ways = [(UNGUIDED, None, None)]
    ways += [(kind, w, make(guidance_scale=w)) for kind, (make, scales) in KINDS.items() for w in scales]
    images = sample_all(args, [guider for _, _, guider in ways])  # per way a list of seeds

    # Judge.
    labels = np.arange(args.num_images) % demo.NUM_CLASSES
    rows = [judge.real_row(args)]
    for (kind, scale, guider), samples in zip(ways, images, strict=True):
        rows.append({"kind": kind, "guidance_scale": scale, **cost(pipeline, guider)})
        rows[-1] |= judge.row([demo.flatten(one) for one in samples], labels)

    # Report.
    report = {
        "command": shlex.join(["python", "benchmarks/guidance_digits.py", *(sys.argv[1:] if argv is None else argv)]),
        "started": started,
        "hardware": hardware("cpu"),
        "versions": versions(),
        "source": source,
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "plot", "output_dir")}
        | {"sampler": f"{type(pipeline.scheduler).__name__}, {demo.NUM_INFERENCE_STEPS} steps"},
        "held_out_digits": len(judge.held_out),
        "rows": rows,
    }
    print(table(report))
    if args.output is not None:
        write_whole(args.output, (json.dumps(report, indent=2) + "\n").encode())
    if args.plot is not None:
        titles = [kind if scale is None else f"{kind}, w {scale:g}" for kind, scale, _ in ways]
        last = {way[0]: index for index, way in enumerate(ways)}  # of several scales the largest
        plot(report, {titles[last[kind]]: images[last[kind]][0] for kind in SHOWN}, args.plot)
    return report


# --------------------------------------------------------------------------------------------------- model and samples


def split(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The three quarters that are trained on, and the rest; the split with which demo.py rates its SVM."""
    return train_test_split(values, test_size=0.25, stratify=labels, random_state=0)


class SeenDigits(DigitsDataset):
    """The digits that are trained on."""

    def __init__(self):
        super().__init__()
        seen, _ = split(np.arange(len(self.labels)), self.labels.numpy())
        self.images, self.labels = self.images[seen], self.labels[seen]


def open_seen_digits(name: str, **options: Any) -> TrainingSource:
    return TrainingSource(SeenDigits(), name="scikit-learn's digits")


def train(args: argparse.Namespace) -> None:
    """The training script's digits recipe on a part of the digits, a source of data of its own."""
    if "seen_digits" not in SOURCES:  # of an earlier call
        register_source("seen_digits", open_seen_digits)
    flags = ["--config", train_tread.DIGITS, "--data", "seen_digits:three quarters"]
    flags += ["--output_dir", args.output_dir, "--max_train_steps", args.max_train_steps]
    flags += ["--checkpointing_steps", args.weak_steps, "--validation_steps", args.max_train_steps]
    train_tread.main([str(flag) for flag in flags])


def load_pipeline(args: argparse.Namespace) -> TREADPipeline:
    """The trained pipeline; its guidance transformer has the averaged weights of the early checkpoint."""
    pipeline = demo.load_pipeline(args.output_dir / "pipeline")
    weak = TREADTransformer2DModel.from_config(pipeline.transformer.config)
    weights = args.output_dir / f"checkpoint-{args.weak_steps}" / EMA_WEIGHTS
    weak.load_state_dict(safetensors.torch.load_file(weights))
    pipeline.guidance_transformer = weak
    return pipeline


def sample_all(args: argparse.Namespace, guiders: list[BaseGuidance | None]) -> list[list[np.ndarray]]:
    """Per guider and seed [B, 8, 8] uint8; each worker has a pipeline of its own, sets that are there stay."""
    pipelines = [load_pipeline(args) for _ in range(args.workers)]  # one by one: diffusers does not load in threads
    labels = np.arange(args.num_images) % demo.NUM_CLASSES
    jobs = [(guider, seed) for guider in guiders for seed in range(args.seeds)]
    paths = [args.output_dir / "sets" / f"{fingerprint(args, guider)}-{seed}.npy" for guider, seed in jobs]
    progress = tqdm(total=len(jobs), desc="Sets of samples")

    def run(worker: int) -> None:
        for (guider, seed), path in list(zip(jobs, paths, strict=True))[worker :: args.workers]:
            if not path.exists():
                guider = copy.deepcopy(guider)  # it counts the steps of one pipeline
                images = demo.sample(pipelines[worker], labels, guider, None, first_seed=seed * args.num_images)
                np.save(buffer := io.BytesIO(), images)
                write_whole(path, buffer.getvalue())
            progress.update()

    with ThreadPoolExecutor(args.workers) as pool, progress:
        list(pool.map(run, range(args.workers)))
    images = [np.load(path) for path in paths]
    return [images[start : start + args.seeds] for start in range(0, len(jobs), args.seeds)]


def fingerprint(args: argparse.Namespace, guider: BaseGuidance | None) -> str:
    """Of all that samples depend on besides their seed and the training, whose folder takes no other settings."""
    name = None if guider is None else guider.to_json_string()
    settings = [name, args.weak_steps, args.num_images, demo.NUM_INFERENCE_STEPS]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def cost(pipeline: TREADPipeline, guider: BaseGuidance | None) -> dict[str, float]:
    """FLOPs of one image, and their share of dense classifier-free guidance; all of each branch counts."""
    guider = ClassifierFreeGuidance(enabled=False) if guider is None else guider
    flops = guidance_flops(pipeline.transformer, guider, num_steps=demo.NUM_INFERENCE_STEPS, shared_prefix=False)
    return {"gigaflops_per_image": flops.total / 1e9, "share_of_cfg": flops.share_of_cfg}


# ------------------------------------------------------------------------------------------------------------- judging


class Judge:
    """Rates samples [B, 64] in [0, 1] by real digits."""

    def __init__(self):
        digits = load_digits()
        labels, pixels = digits.target, demo.flatten(np.rint(digits.images / 16 * 255))
        self.seen, self.held_out = split(pixels, labels)
        self.seen_labels, self.held_out_labels = split(labels, labels)
        self.svm, _, self.real_accuracy = demo.train_judge()
        self.network = MLPClassifier((64, 32), max_iter=400, random_state=0).fit(self.seen, self.seen_labels)
        self.references = {name: self.statistics(name, self.held_out) for name in ("pixel", "feature")}

    def features(self, images: np.ndarray) -> np.ndarray:
        """[B, 32], the last hidden layer of a network that was trained to recognise the digits of the training."""
        for weight, bias in list(zip(self.network.coefs_, self.network.intercepts_, strict=True))[:-1]:
            images = np.maximum(images @ weight + bias, 0)
        return images

    def statistics(self, name: str, images: np.ndarray) -> FeatureStatistics:
        features = images if name == "pixel" else self.features(images)
        return FeatureStatistics.from_features(torch.from_numpy(features))

    def row(self, sets: list[np.ndarray], labels: np.ndarray) -> dict[str, list[float]]:
        """One number per set of images."""
        return {"accuracy": [float(self.svm.score(images, labels)) for images in sets]} | self.distances(sets)

    def distances(self, sets: list[np.ndarray]) -> dict[str, list[float]]:
        return {
            f"{name}_distance": [frechet_distance(self.statistics(name, images), reference) for images in sets]
            for name, reference in self.references.items()
        }

    def real_row(self, args: argparse.Namespace) -> dict[str, Any]:
        """As many digits of the training in the place of samples; the accuracy is on the held-out ones, unseen."""
        numbers = [np.random.default_rng(seed) for seed in range(args.seeds)]
        sets = [number.choice(self.seen, args.num_images, replace=False) for number in numbers]
        kind = {"kind": REAL, "guidance_scale": None, "gigaflops_per_image": None, "share_of_cfg": None}
        return {**kind, "accuracy": [self.real_accuracy] * args.seeds, **self.distances(sets)}


# ----------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """A line per row, mean and standard deviation of the seeds."""
    lines = ["| kind | w | FLOPs | recognised | distance of pixels | of features |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        scale = "" if row["guidance_scale"] is None else f"{row['guidance_scale']:g}"
        share = "" if row["share_of_cfg"] is None else f"{row['share_of_cfg']:.0%}"
        accuracy, pixel, feature = [(statistics.mean(row[name]), statistics.stdev(row[name])) for name in METRICS]
        lines.append(
            f"| {row['kind']} | {scale} | {share} | {accuracy[0]:.1%} ± {accuracy[1]:.1%} | {pixel[0]:.3f} ± "
            f"{pixel[1]:.3f} | {feature[0]:.2f} ± {feature[1]:.2f} |"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], panels: dict[str, np.ndarray], path: Path) -> None:
    """Each row's metrics, mean and standard deviation of the seeds, with its FLOPs in brackets; some samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.5, 1])
    axes = above.subplots(1, len(METRICS), sharey=True)
    rows = report["rows"]
    scales = ["" if row["guidance_scale"] is None else f", w {row['guidance_scale']:g}" for row in rows]
    shares = ["" if row["share_of_cfg"] is None else f" ({row['share_of_cfg']:.0%})" for row in rows]
    names = [f"{row['kind']}{scale}{share}" for row, scale, share in zip(rows, scales, shares, strict=True)]
    for axis, (name, title) in zip(axes, METRICS.items(), strict=True):
        for place, row in enumerate(rows):
            color = "black" if place < 2 else f"C{list(KINDS).index(row['kind'])}"
            mean, spread = statistics.mean(row[name]), statistics.stdev(row[name])
            axis.errorbar(mean, place, xerr=spread, marker="o", capsize=3, color=color)
        axis.axvline(statistics.mean(rows[1][name]), linestyle="--", linewidth=1, color="black")
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()

    for axis, (title, images) in zip(below.subplots(1, len(panels)), panels.items(), strict=True):
        shown = images[: 8 * demo.NUM_CLASSES].reshape(-1, demo.NUM_CLASSES, demo.SIZE, demo.SIZE)
        framed = np.pad(shown, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=96)
        grid = framed.transpose(0, 2, 1, 3).reshape(-1, framed.shape[1] * framed.shape[3])
        axis.imshow(grid, cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_whole(path, buffer.getvalue())


if __name__ == "__main__":
    main()
