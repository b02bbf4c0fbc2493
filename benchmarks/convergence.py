# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains dense and routed models on avatars or digits and compares what they learn per step, per second and per FLOP.

    python benchmarks/convergence.py --make_data outputs/avatars32.npz
    python benchmarks/convergence.py --data outputs/avatars32.npz --variants dense,routed,ratio=0.75,start=0 \\
        --seeds 0,1,2 --output benchmarks/results/convergence_cpu.json --resume

All variants of a seed have the same first weights, order of images, times and noise: only their routes differ. They
train by flow matching in pixel space. The averaged weights are judged, dense, by their loss on held-out images and by
the Fréchet distance of samples to held-out images in the features of a small classifier. Seconds count only training
steps; with `--threads 1` on the CPU they are CPU time. The output is written after each evaluation, and --resume does
not repeat the finished runs in it.
"""

import argparse
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DTYPES, finish_report, hardware, keep_freed_memory, start_report, write_whole
from convergence_data import Images, draw_avatars, read_digits, read_folders
from convergence_judge import HeldOutLoss, Judge, level_weights
from convergence_report import SampleSheet, plot, summarise, table
from convergence_train import Draws, Run, Variant, to_device

from diffusers_tread import FlowMatchingObjective


# Flags that change no run's result: what else is in "settings" must be the same to go on with a report.
FREE = ("make_data", "train_folder", "heldout_folder", "digits", "num_train", "num_heldout", "size", "data", "output")
FREE += ("plot", "plot_against", "samples", "from_json", "resume", "time_limit")
LISTS = ("variants", "seeds")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("data").add_argument
    group("--data", type=Path, help="NPZ file of --make_data.")
    group("--make_data", type=Path, metavar="FILE", help="Make that file instead of training.")
    group("--train_folder", type=Path, help="To make it of FOLDER/CLASS/*.png; by default dicebear draws.")
    group("--heldout_folder", type=Path, help="As --train_folder, of other images.")
    group("--digits", action="store_true", help="To make it of scikit-learn's handwritten digits, 8 x 8 pixels.")
    group("--num_train", type=int, default=20000, help="Images to draw for training.")
    group("--num_heldout", type=int, default=6000, help="And for judging.")
    group("--size", type=int, default=32, help="Their side in pixels.")

    group = parser.add_argument_group("what is compared").add_argument
    group("--variants", default="dense,routed", help="By commas; changes of the default route such as ratio=0.75, "
          "start=0, end=6, unit=row, dense_end=0.15, steps=1.4 are joined by +.")  # fmt: skip
    group("--seeds", default="0", help="Of weights and draws, by commas.")
    group("--time_limit", type=float, help="Seconds after which nothing starts that would not be done by then.")

    group = parser.add_argument_group("model and training").add_argument
    group("--model", help="Class name and arguments of another denoiser as JSON, such as "
          '{"_class_name": "TREADMamba2DModel", ...}; --width and --heads are then not used.')  # fmt: skip
    group("--width", type=int, default=96, help="Channels of a token.")
    group("--depth", type=int, default=12, help="Blocks.")
    group("--heads", type=int, default=3, help="Of attention.")
    group("--patch_size", type=int, default=2, help="Pixels on a token's side.")
    group("--steps", type=int, default=2000, help="Optimiser steps.")
    group("--batch_size", type=int, default=16, help="Images per step.")
    group("--lr", type=float, default=1.5e-3, help="Largest learning rate.")
    group("--warmup_steps", type=int, default=100, help="Steps in which it rises.")
    group("--decay", type=float, default=0.2, help="Share of the steps, the last ones, in which it falls to zero.")
    group("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to it.")
    group("--ema_decay", type=float, default=0.999, help="Of the averaged weights.")
    group("--label_drop", type=float, default=0.1, help="Share of labels that become the null class.")

    group = parser.add_argument_group("judging").add_argument
    group("--evaluations", type=int, default=10, help="Times the averaged weights are judged, evenly, but the start.")
    group("--samples_at", type=int, default=4, help="At how many of them, evenly, samples are judged as well.")
    group("--heldout_per_level", type=int, default=64, help="Held-out images for each of ten noise levels.")
    group("--num_samples", type=int, default=500, help="Samples, and real images in their place.")
    group("--sampling_steps", type=int, default=40, help="Of Euler's method.")
    group("--guidance_scales", default="1", help="Of classifier-free guidance, by commas; 1 is none.")
    group("--eval_batch_size", type=int, default=100, help="Images; --compile compiles each size that occurs.")
    group("--judge_steps", type=int, default=300, help="Optimiser steps of the classifier.")

    group = parser.add_argument_group("machine and output").add_argument
    group("--device", default="cpu", help="cpu, cuda, mps, ...")
    group("--threads", type=int, help="Threads on the CPU; by default torch's choice.")
    group(
        "--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32."
    )
    group("--compile", action="store_true", help="Compile the blocks.")
    group("--warmup", type=int, default=2, help="Steps of a run that is thrown away, before each timed one.")
    group("--output", type=Path, help="JSON file to write; by default none.")
    group("--resume", action="store_true", help="Keep the finished runs in --output.")
    group("--from_json", type=Path, metavar="FILE", help="Print and plot that report instead of training.")
    group("--plot", type=Path, help="PNG file to write; by default none.")
    group("--plot_against", choices=("seconds", "flops"), default="seconds", help="What the plot's right parts show.")
    group("--samples", type=Path, help="PNG file to write, samples of each variant with the first seed.")
    args = parser.parse_args(argv)

    args.variants, args.seeds = args.variants.split(","), [int(seed) for seed in args.seeds.split(",")]
    args.guidance_scales = [float(scale) for scale in args.guidance_scales.split(",")]
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if args.from_json is None and args.make_data is None and args.data is None:
        raise ValueError("Expected --data FILE, got none. Make one with --make_data FILE.")
    if (args.train_folder is None) != (args.heldout_folder is None):
        raise ValueError("Expected both --train_folder and --heldout_folder or none of them, got one.")
    if args.width % args.heads:
        raise ValueError(f"Expected --width divisible by --heads, got {args.width} and {args.heads}.")
    if not 1 <= args.samples_at <= args.evaluations <= args.steps:
        raise ValueError(
            f"Expected 1 <= --samples_at <= --evaluations <= --steps, got {args.samples_at}, {args.evaluations} and "
            f"{args.steps}."
        )
    if args.evaluations < 2 or not 0 <= args.decay < 1:
        raise ValueError(
            f"Expected --evaluations >= 2 and --decay in [0, 1), got {args.evaluations} and {args.decay}."
        )
    for name in LISTS:
        if len(set(getattr(args, name))) != len(getattr(args, name)):
            raise ValueError(f"Expected each of --{name} once, got {getattr(args, name)}.")
    if args.resume and args.output is None:
        raise ValueError("Expected --output FILE with --resume, got none.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Does what the flags ask for; gives the report, empty where data is made."""
    args = parse_args(argv)
    if args.make_data is not None:
        make_data(args)
        return {}
    if args.from_json is not None:
        report = json.loads(args.from_json.read_text(encoding="utf-8"))
        report["summary"] = summarise(report["runs"], decay=report["settings"]["decay"])
    else:
        report = compare_variants(args, argv)
    print(table(report))
    if args.plot is not None:
        plot(report, args.plot, against=args.plot_against)
    return report


def make_data(args: argparse.Namespace) -> None:
    if args.digits:
        images = read_digits()
    elif args.train_folder is not None:
        images = read_folders(args.train_folder, args.heldout_folder, size=args.size)
    else:
        images = draw_avatars(num_train=args.num_train, num_heldout=args.num_heldout, size=args.size)
    images.save(args.make_data)
    print(f"{args.make_data}: {args.make_data.stat().st_size / 2**20:.1f} MiB.")


# ------------------------------------------------------------------------------------------------------------- running


def compare_variants(args: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """Trains each variant with each seed; gives the report."""
    start, report = time.perf_counter(), start_report("convergence.py", argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph per number of tokens, of images and mode
    for text in args.variants:
        if Variant.parse(text, depth=args.depth).num_steps(args.steps) < args.evaluations:
            raise ValueError(f"Expected at least --evaluations {args.evaluations} steps, got fewer for {text!r}.")

    images = Images.load(args.data)
    data = to_device(images, args.device)
    report["data"] = describe_data(args.data, images)
    report["runs"] = finished_runs(args, report["data"]) if args.resume else []
    evaluate = Evaluation(args, data=data, num_classes=len(images.class_names))
    # Once, because it asks for the hardware, which takes time; `save` writes what comes to it.
    finish_report(report, kept(args), judge=evaluate.judge.report, summary={})

    sheet = None if args.samples is None else SampleSheet(args.samples, images, keep=bool(report["runs"]))
    train_all(args, report, data=data, evaluate=evaluate, sheet=sheet, start=start)
    save(report, args)
    return report


def train_all(
    args: argparse.Namespace,
    report: dict[str, Any],
    *,
    data: dict[str, torch.Tensor],
    evaluate: "Evaluation",
    sheet: SampleSheet | None,
    start: float,
) -> None:
    """Adds the missing runs to the report, a seed's variants one after the other, and saves it at each point."""
    done, took = {(run["variant"], run["seed"]) for run in report["runs"]}, {}
    for seed, name in itertools.product(args.seeds, args.variants):
        if (name, seed) in done:
            continue
        expected = took.get(name, max(took.values(), default=0.0))
        if args.time_limit is not None and took and time.perf_counter() - start + expected > args.time_limit:
            print(f"Left out {name}, seed {seed}, and what comes after: --time_limit.")
            break

        report["runs"].append(run := {"variant": name, "seed": seed, "finished": False, "points": []})
        for point in train_variant(args, name, seed, data=data, evaluate=evaluate):
            if not run["points"]:
                begin = time.perf_counter()  # after the warm-up, in which a first run compiles
            run["points"].append(point)
            print_point(run, seconds=time.perf_counter() - start)
            save(report, args)
        run["finished"], took[name] = True, time.perf_counter() - begin
        save(report, args)
        if sheet is not None and seed == args.seeds[0]:
            sheet.add(name, evaluate.last_images)


def train_variant(
    args: argparse.Namespace, name: str, seed: int, *, data: dict[str, torch.Tensor], evaluate: "Evaluation"
) -> Iterator[dict[str, Any]]:
    """The points of one run, after the warm-up of another one."""
    variant = Variant.parse(name, depth=args.depth)
    make = partial(
        Run,
        args,
        variant,
        seed,
        images=data["train_images"],
        labels=data["train_labels"],
        draws=Draws.make(args, seed, steps=variant.num_steps(args.steps), num_images=len(data["train_images"])),
        num_classes=evaluate.judge.num_classes,
    )
    make().warm_up()
    gc.collect()  # compiled models refer to themselves
    yield from make().train(evaluate)


class Evaluation:
    """Judges a run's averaged weights: their held-out loss each time, samples at some of them."""

    def __init__(self, args: argparse.Namespace, *, data: dict[str, torch.Tensor], num_classes: int):
        self.args = args
        self.judge = Judge(args, data=data, num_classes=num_classes)
        self.heldout_loss = HeldOutLoss(args, images=data["heldout_images"], labels=data["heldout_labels"])
        self.weights = level_weights(FlowMatchingObjective()).tolist()
        self.samples_at = {round(args.evaluations * (k + 1) / args.samples_at) for k in range(args.samples_at)}
        self.last_images: np.ndarray | None = None
        """[classes, H, W, 3] uint8, the first sample of each class with the first guidance scale."""

    def scales(self, run: Run, number: int) -> list[float]:
        """The guidance scales of the samples that are judged at the evaluation of this number; may be none."""
        return self.args.guidance_scales if number in self.samples_at else []

    def __call__(self, run: Run, number: int) -> dict[str, Any]:
        """What a point of the report has of the evaluation of this number, 0 at the start."""
        losses = self.heldout_loss(run.averaged)
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        point = {"heldout_loss": total, "heldout_losses": losses}
        scales = self.scales(run, number)
        if scales:
            point["samples"] = {}
        for scale in scales:
            point["samples"][f"{scale:g}"], images = self.judge(run.averaged, seed=run.seed, scale=scale)
            if scale == scales[0]:
                self.last_images = images[: self.judge.num_classes].permute(0, 2, 3, 1).cpu().numpy()
        return point


def describe_data(path: Path, images: Images) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "train_images": len(images.train_images),
        "heldout_images": len(images.heldout_images),
        "size": images.size,
        "classes": len(images.class_names),
    }


def finished_runs(args: argparse.Namespace, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Those in --output, none where there is no such file.

    Raises:
        ValueError: They had other settings or data, or another device.
    """
    if not args.output.exists():
        return []
    report = json.loads(args.output.read_text(encoding="utf-8"))
    before = report["settings"] | {"data": report["data"], "accelerator": report["hardware"]["accelerator"]}
    now = vars(kept(args)) | {"data": data, "accelerator": hardware(args.device)["accelerator"]}
    other = sorted(name for name in now if name not in (*LISTS, "output") and before.get(name) != now[name])
    if other:
        raise ValueError(
            f"Expected {args.output} to be of the same settings, got other {', '.join(other)}. Give another --output."
        )
    return [run for run in report["runs"] if run["finished"]]


def save(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Brings the report up to date and writes --output, whole."""
    report["summary"] = summarise(report["runs"], decay=args.decay)
    if args.output is not None:
        write_whole(args.output, (json.dumps(report, indent=2) + "\n").encode())


def kept(args: argparse.Namespace) -> argparse.Namespace:
    """The flags that a report has as settings, and --output."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    return argparse.Namespace(**settings, output=args.output)


def print_point(run: dict[str, Any], *, seconds: float) -> None:
    point = run["points"][-1]
    verdicts = [
        f"CFG {scale}: distance {verdict['distance']:.2f}, {verdict['recognised']:.0%} recognised"
        for scale, verdict in point.get("samples", {}).items()
    ]
    print(
        f"{seconds:6.0f} s  {run['variant']}, seed {run['seed']}, step {point['step']}: {point['seconds']:.1f} s, "
        f"held-out loss {point['heldout_loss']:.4f}",
        *verdicts,
        sep="; ",
        flush=True,
    )


if __name__ == "__main__":
    main()
