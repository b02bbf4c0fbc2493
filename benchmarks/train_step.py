# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times a training step (forward, backward, AdamW) dense and routed, beside what the FLOPs allow.

    python benchmarks/train_step.py --presets S/2,B/2 --tokens 256 --output benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --presets B/2,XL/2 --tokens 256,1024 --modes eager,compiled --batch_size 32 \\
        --device cuda --dtype bfloat16

Dense and routed steps of the same model take turns, so that a change of the machine's speed meets both; reported are
medians and quartiles. The FLOP ceiling counts attention (`diffusers_tread.flops`); on a quiet machine measured/ceiling
stays below 1, apart from noise. Close other programs first: who shares its cores measures the others.
"""

import argparse
import io
import itertools
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    check_common,
    finish_report,
    make_parser,
    start_report,
    summary,
    time_in_turns,
    write_whole,
)

from diffusers_tread import EDMObjective, TREADTransformer2DModel, get_token_router
from diffusers_tread.flops import flop_ceiling


MODES = ("eager", "compiled")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=15, warmup=3)
    add = parser.add_argument
    add("--presets", default="S/2,B/2", help="Sizes, separated by commas.")
    add("--tokens", default="256", help="Tokens per image, square numbers separated by commas.")
    add("--modes", default="eager", help="eager, compiled or both, separated by commas.")
    add("--batch_size", type=int, default=8, help="Images per step.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add("--plot", type=Path, help="PNG file to write; by default none.")
    args = parser.parse_args(argv)

    check_common(args)
    for name in ("presets", "modes"):
        setattr(args, name, [value.strip() for value in getattr(args, name).split(",")])
    args.tokens = [int(value) for value in args.tokens.split(",")]
    if unknown := sorted(set(args.modes) - set(MODES)):
        raise ValueError(f"Expected --modes among {list(MODES)}, got {unknown}.")
    if wrong := [tokens for tokens in args.tokens if tokens < 1 or round(tokens**0.5) ** 2 != tokens]:
        raise ValueError(f"Expected square numbers in --tokens, such as 256 or 1024, got {wrong}.")
    if args.batch_size < 1:
        raise ValueError(f"Expected --batch_size >= 1, got {args.batch_size}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("train_step.py", argv)

    rows = []
    print("model  tokens mode          dense    routed speed-up  ceiling quotient")
    for preset in args.presets:
        for tokens in args.tokens:
            for mode in args.modes:
                rows.append(measure(preset, tokens, mode, args))
                print(format_row(rows[-1]), flush=True)

    finish_report(report, args, rows=rows)
    if args.plot is not None:
        plot(rows, args.plot)
    return report


def measure(preset: str, num_tokens: int, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of dense and routed steps, taken in turns."""
    torch.manual_seed(args.seed)
    step, model = make_step(preset, num_tokens, mode, args)
    times = time_in_turns({"dense": partial(step, False), "routed": partial(step, True)}, args)

    speedup = statistics.median(times["dense"]) / statistics.median(times["routed"])
    ceiling = flop_ceiling(model, num_tokens, selection_ratio=args.selection_ratio)
    return {
        "preset": preset,
        "num_tokens": num_tokens,
        "mode": mode,
        "dense_seconds": summary(times["dense"]),
        "routed_seconds": summary(times["routed"]),
        "speedup": speedup,
        "speedup_of_pairs": summary([d / r for d, r in zip(times["dense"], times["routed"], strict=True)]),
        "flop_ceiling": ceiling,
        "speedup_over_ceiling": speedup / ceiling,
    }


def make_step(preset: str, num_tokens: int, mode: str, args: argparse.Namespace):
    """A function that takes one training step, routed or not, and the model it trains."""
    device, sample_size = torch.device(args.device), round(num_tokens**0.5) * int(preset.split("/")[-1])
    model = TREADTransformer2DModel.from_preset(preset, sample_size=sample_size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if mode == "compiled":
        model.compile(fullgraph=True, dynamic=False)

    latents = torch.randn(args.batch_size, 4, sample_size, sample_size, device=device)  # B C H W
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    objective, router, seeds = EDMObjective(), get_token_router(model), itertools.count(args.seed)
    router.selection_ratio = args.selection_ratio

    def step(routed: bool) -> None:
        router.enabled, router.seed = routed, next(seeds)  # a fresh subset, without drawing inside a compiled forward
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
            loss = objective.loss(model, latents, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def format_row(row: dict[str, Any]) -> str:
    dense, routed = row["dense_seconds"]["median"], row["routed_seconds"]["median"]
    return (
        f"{row['preset']:6} {row['num_tokens']:6} {row['mode']:9} {dense * 1e3:6.0f} ms {routed * 1e3:6.0f} ms "
        f"{row['speedup']:8.2f} {row['flop_ceiling']:8.2f} {row['speedup_over_ceiling']:8.0%}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured speed-up of each row, with quartiles of its pairs, under a line at its FLOP ceiling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.3 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    for position, row in enumerate(rows):
        pairs = row["speedup_of_pairs"]
        spread = [
            [max(row["speedup"] - pairs["first_quartile"], 0)],
            [max(pairs["third_quartile"] - row["speedup"], 0)],
        ]
        axis.bar(position, row["speedup"], width=0.6, yerr=spread, capsize=4, color="tab:blue")
        axis.hlines(row["flop_ceiling"], position - 0.4, position + 0.4, color="black")
    axis.set_xticks(range(len(rows)), [f"{row['preset']}\n{row['num_tokens']} tokens\n{row['mode']}" for row in rows])
    axis.set_ylabel("dense / routed step time (line: FLOP ceiling)")
    axis.set_ylim(bottom=1.0 if all(row["speedup"] > 1.0 for row in rows) else 0.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


if __name__ == "__main__":
    main()
