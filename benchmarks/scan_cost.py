# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times the scan of Mamba-2 beside the attention of a transformer of the same width, forward and backward.

    python benchmarks/scan_cost.py --threads 1 --output benchmarks/results/scan_cost_cpu.json

Both are timed in turns, without their projections: the scan in both directions with twice the width, and attention
with the width, in heads of 64 channels. On the CPU seconds are CPU time, so there must be one thread.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import finish_report, make_parser, set_up, start_report, summary

from diffusers_tread.models.mamba_tread_2d import bidirectional_scan


HEAD_DIM = STATE_SIZE = 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3, warmup=1)
    add = parser.add_argument
    add("--width", type=int, default=384, help="Of the models, divisible by 64.")
    add("--shapes", default="8x128,8x256,2x1024,1x4096", help="Images x tokens, separated by commas.")
    add("--chunk_sizes", default="default", help="Of the scan, separated by commas.")
    args = parser.parse_args(argv)
    set_up(args)
    if args.device == "cpu" and torch.get_num_threads() > 1:
        raise ValueError(f"Expected --threads 1 on the CPU, got {torch.get_num_threads()}.")
    args.shapes = [[int(size) for size in shape.split("x")] for shape in args.shapes.split(",")]
    args.chunk_sizes = [None if size == "default" else int(size) for size in args.chunk_sizes.split(",")]
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("scan_cost.py", argv)
    torch.manual_seed(args.seed)
    rows = []
    for batch_size, num_tokens in args.shapes:
        times = time_steps(make_steps(batch_size, num_tokens, args), batch_size, args)
        rows.append({"batch_size": batch_size, "num_tokens": num_tokens, "milliseconds_per_image": times})
        medians = "  ".join(f"{name} {value['median']:.2f}" for name, value in times.items())
        print(f"{batch_size} x {num_tokens}, ms per image: {medians}", flush=True)
    return finish_report(report, args, rows=rows)


def make_steps(batch_size: int, num_tokens: int, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Forward and backward, by name."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, device=args.device).requires_grad_()

    heads = args.width // HEAD_DIM
    qkv = [random(heads, num_tokens, HEAD_DIM) for _ in range(3)]
    x, b, c = random(num_tokens, 2 * heads, HEAD_DIM), random(num_tokens, 2, 64), random(num_tokens, 2, STATE_SIZE)
    time_step = (0.1 * random(num_tokens, 2, 2 * heads).sigmoid()).detach().requires_grad_()
    log_decay = (-10 * time_step).detach().requires_grad_()

    def run(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, **settings: Any) -> None:
        output = function(*inputs, **settings)
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    scans = {
        f"scan_{chunk_size or 'default'}": lambda chunk_size=chunk_size: run(
            bidirectional_scan, x, time_step, log_decay, b, c, chunk_size=chunk_size
        )
        for chunk_size in args.chunk_sizes
    }
    return {"attention": lambda: run(F.scaled_dot_product_attention, *qkv), **scans}


def time_steps(
    steps: dict[str, Callable[[], Any]], batch_size: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Milliseconds of one image of each step, in turns."""
    clock = time.thread_time if args.device == "cpu" else time.perf_counter
    times = {name: [] for name in steps}
    for repeat in range(args.warmup + args.repeats):
        for name, step in steps.items():
            start = clock()
            step()
            if args.device != "cpu":
                torch.accelerator.synchronize()
            if repeat >= args.warmup:
                times[name].append(1e3 * (clock() - start) / batch_size)
    return {name: summary(values) for name, values in times.items()}


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown, medians."""
    names = list(report["rows"][0]["milliseconds_per_image"])
    scans = [name for name in names if name != "attention"]
    lines = [["images x tokens", *names, *(f"{name} over attention" for name in scans)]]
    lines.append(["---"] * len(lines[0]))
    for row in report["rows"]:
        times = {name: values["median"] for name, values in row["milliseconds_per_image"].items()}
        lines.append([f"{row['batch_size']} x {row['num_tokens']:,}", *(f"{times[name]:.3g}" for name in names)])
        lines[-1] += [f"{times[name] / times['attention']:.2f}" for name in scans]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("scan_default", "scan")


if __name__ == "__main__":
    main()
