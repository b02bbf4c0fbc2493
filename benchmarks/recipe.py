# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Adds the pieces of the recipe of 2026 to dense and routed models, one by one, and says what each is worth.

    python benchmarks/convergence.py --make_data outputs/avatars32.npz
    python benchmarks/recipe.py --data outputs/avatars32.npz --device cuda --dtype bfloat16 --compile --workers 6 \\
        --output benchmarks/results/recipe_gpu.json

A variant is a base, "dense", "tread" (the default route) or "sprint" (SPRINT's sparse middle), and pieces: "modern"
(the blocks), "align" (representation alignment on the kept tokens, with a teacher that this script trains on the
training images), "muon" and "delayed" (the route). All variants of a seed see the same images, times and noise.

1. Learning rates are chosen, AdamW's for the first routed variant and Muon's for the first with Muon, by the held-out
   loss after a few steps of a seed that is used for nothing else.
2. The steps of all variants take turns on the idle device: these are the times that are compared.
3. The variants are trained, several at once, all variants of one seed before the next seed. The learning rate does not
   fall, so averaged weights can be judged at any step. Each variant is trained for --steps and, if it is faster than
   the dense one, on until it has taken as long, both by the clock and by the time of the GPU's kernels.

If a variant fails, it is reported, the others go on, and the exit status is 1. The output is written as runs end and
samples are judged.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import DTYPES, finish_report, make_parser, set_up, start_report
from convergence import describe_data
from convergence_data import Images
from convergence_train import BASELINE, to_device
from recipe_report import plot, summarise, table
from recipe_study import SWEEP_SEED, Study
from recipe_train import Recipe, RecipeEvaluation, train_teacher
from recipe_workers import Shared, Workers, prepare_compiler


VARIANTS = "dense,tread,tread+modern,tread+modern+align,tread+modern+align+muon,tread+modern+align+muon+delayed"
VARIANTS += ",sprint,sprint+modern+align+muon"
ALONE = "dense+modern,dense+align,dense+muon,tread+align,tread+muon,tread+delayed"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5, warmup=1)
    group = parser.add_argument_group("what is compared").add_argument
    group("--data", type=Path, help="NPZ file that convergence.py makes.")
    group("--variants", default=VARIANTS, help="By commas.")
    group("--alone", default=ALONE, help="More of them, which are timed with the others and trained after them.")
    group("--seeds", default="0,1,2", help="Of weights and draws, by commas.")
    group("--workers", type=int, default=0, help="Processes that train at once on the device; 0 for this one alone.")
    group("--time_limit", type=float, help="Seconds after which no run starts that would not be done by then.")

    group = parser.add_argument_group("model and training").add_argument
    group("--width", type=int, default=256, help="Channels of a token.")
    group("--depth", type=int, default=12, help="Blocks.")
    group("--heads", type=int, default=4, help="Of attention.")
    group("--patch_size", type=int, default=2, help="Pixels on a token's side.")
    group("--steps", type=int, default=300, help="Optimiser steps.")
    group("--batch_size", type=int, default=256, help="Images per step.")
    group("--warmup_steps", type=int, default=50, help="Steps in which the learning rate rises.")
    group("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to it.")
    group("--ema_decay", type=float, default=0.999, help="Of the averaged weights, reached after a warm-up.")
    group("--label_drop", type=float, default=0.1, help="Share of labels that become the null class.")
    group("--lrs", default="5e-4,1e-3,2e-3,4e-3", help="AdamW's learning rates to choose from, by commas.")
    group("--muon_lrs", default="5e-4,1e-3,2e-3,4e-3", help="Muon's, scaled to match AdamW's updates.")
    group("--sweep_steps", type=int, default=150, help="After which the rates are compared.")

    group = parser.add_argument_group("alignment").add_argument
    group("--align_block", type=int, default=3, help="After which tokens are aligned, 0-based, or the route's first.")
    group("--align_weight", type=float, default=0.5, help="Of the alignment.")
    group("--projector_dim", type=int, default=512, help="Width of the projector's hidden layers.")
    group("--teacher_steps", type=int, default=600, help="Optimiser steps of the teacher.")
    group("--teacher_batch_size", type=int, default=256, help="Its images per step.")

    group = parser.add_argument_group("judging").add_argument
    group("--evaluations", type=int, default=6, help="Times the averaged weights are judged, evenly, but the start.")
    group("--samples_at", type=int, default=2, help="At how many of them, evenly, samples are judged as well.")
    group("--heldout_per_level", type=int, default=80, help="Held-out images for each of ten noise levels.")
    group("--num_samples", type=int, default=800, help="Samples, and real images in their place.")
    group("--sampling_steps", type=int, default=16, help="Of Euler's method.")
    group(
        "--guidance_scales",
        default="1,1.5",
        help="Of classifier-free guidance, by commas; the others than the first at equal steps alone; 1 is none.",
    )
    group("--eval_batch_size", type=int, default=400, help="Images; --compile compiles each size that occurs.")
    group("--judge_steps", type=int, default=600, help="Optimiser steps of the classifier.")

    group = parser.add_argument_group("machine and output").add_argument
    group("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast.")
    group("--compile", action="store_true", help="Compile the blocks.")
    group("--steps_per_turn", type=int, default=5, help="Steps that are timed together.")
    group("--from_json", type=Path, metavar="FILE", help="Print and plot that report instead of training.")
    group("--plot", type=Path, help="PNG file to write; by default none.")
    args = parser.parse_args(argv)

    for name, kind in (("lrs", float), ("muon_lrs", float), ("seeds", int), ("guidance_scales", float)):
        setattr(args, name, [kind(value) for value in getattr(args, name).split(",")])
    args.variants, args.alone = args.variants.split(","), [name for name in args.alone.split(",") if name]
    args.model, args.decay, args.lr, args.muon_lr = None, 0.0, args.lrs[0], args.muon_lrs[0]
    set_up(args)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if args.from_json is None and args.data is None:
        raise ValueError("Expected --data FILE, got none. Make one with convergence.py --make_data FILE.")
    names = [*args.variants, *args.alone]
    if len(set(names)) < len(names) or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"Expected each variant and each seed once, got {names} and {args.seeds}.")
    if args.variants[0] != BASELINE or args.seeds[:1] == [] or SWEEP_SEED in args.seeds:
        raise ValueError(f"Expected {BASELINE} first in --variants and seeds other than {SWEEP_SEED}.")
    if not 1 <= args.samples_at <= args.evaluations <= args.steps:
        raise ValueError(
            f"Expected 1 <= --samples_at <= --evaluations <= --steps, got {args.samples_at}, {args.evaluations} and "
            f"{args.steps}."
        )
    for name in names:
        Recipe.parse(name, depth=args.depth)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Does what the flags ask for; gives the report.

    Raises:
        SystemExit: A variant failed; the report has been written.
    """
    args = parse_args(argv)
    if args.from_json is not None:
        report = json.loads(args.from_json.read_text(encoding="utf-8"))
        report["summary"] = summarise(report)
    else:
        report = compare_recipes(args, argv)
    print(table(report))
    if args.plot is not None and report["summary"]:
        plot(report, args.plot)
    if report["failures"]:
        raise SystemExit(1)
    return report


def compare_recipes(args: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """Chooses rates, times steps and trains; gives the report."""
    start, report = time.perf_counter(), start_report("recipe.py", argv)
    workers = Workers(args.workers)
    prepare_compiler()

    # Data, judge and teacher, once for all processes.
    images = Images.load(args.data)
    data = to_device(images, args.device)
    evaluate = RecipeEvaluation(args, data=data, num_classes=len(images.class_names))
    teacher, told = train_teacher(args, data["train_images"])
    shared = Shared(images=data["train_images"], labels=data["train_labels"], evaluate=evaluate, teacher=teacher)
    report |= {"data": describe_data(args.data, images), "judge": evaluate.judge.report, "teacher": told}
    report |= {"sweep": [], "steps": {}, "runs": [], "failures": [], "left_out": [], "summary": {}}
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "from_json")}
    finish_report(report, argparse.Namespace(**settings))

    with tempfile.TemporaryDirectory() as folder:
        workers.share(args, shared, Path(folder) / "shared.pt")
        study = Study(args, report, shared=shared, workers=workers, start=start)
        study.prepare()
        study.time_steps()
        study.train()
        workers.close()
    return report


if __name__ == "__main__":
    main()
