# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times guided sampling with `TREADPipeline`, beside what the FLOPs allow.

    python benchmarks/sampling.py --output benchmarks/results/sampling_cpu.json
    python benchmarks/sampling.py --device cuda --dtype bfloat16 --compile --batch_size 32 --num_inference_steps 20 \\
        --repeats 10 --warmup 2 --output benchmarks/results/sampling_gpu.json

No guidance, dense classifier-free guidance (CFG) and Sparse Guidance (SG, strong and weak ratio) take turns. A
prediction costs the same at every step, so one step is enough. "SG, apart" runs both branches from the first block on,
as CFG + SG must, or a loop that does not share the blocks before the first route. Weights are random, and there is no
VAE. With one or two images on a CPU, reading the weights takes much of the weak branch's time. Close other programs
first.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary, time_in_turns
from diffusers import BaseGuidance, ClassifierFreeGuidance

from diffusers_tread import (
    Branch,
    EDMObjective,
    FlowMatchingObjective,
    SparseGuidance,
    TREADPipeline,
    TREADTransformer2DModel,
)
from diffusers_tread.flops import guidance_flops


class GuidanceApart(SparseGuidance):
    """Sparse Guidance that does not tell the pipeline that its branches share their inputs."""

    def branches(self) -> list[Branch]:
        return [replace(branch, shares_prefix=False) for branch in super().branches()]


KINDS = {
    "none": partial(ClassifierFreeGuidance, enabled=False),
    "CFG": ClassifierFreeGuidance,
    "SG 0/0.7": partial(SparseGuidance, strong_ratio=0.0, weak_ratio=0.7),
    "SG 0.5/0.9": partial(SparseGuidance, strong_ratio=0.5, weak_ratio=0.9),
    "SG 0.5/0.9, apart": partial(GuidanceApart, strong_ratio=0.5, weak_ratio=0.9),
}
# What is run with the sampler of each objective: a prediction costs the same in both.
SAMPLERS = {
    "flow Euler": (FlowMatchingObjective(), tuple(KINDS)),
    "EDM Heun": (EDMObjective(), ("CFG", "SG 0/0.7", "SG 0.5/0.9")),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=2, warmup=0)
    add = parser.add_argument
    add("--preset", default="XL/2", help="Size of the transformer.")
    add("--tokens", type=int, default=256, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=4, help="Images per call.")
    add("--num_inference_steps", type=int, default=1, help="Steps N; Heun's method calls the model 2N - 1 times.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Of the weights.")
    add("--compile", action="store_true", help="Compile the blocks, one graph per token count; wants --warmup of 1.")
    args = parser.parse_args(argv)

    set_up(args)
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if args.batch_size < 1 or args.num_inference_steps < 1:
        raise ValueError(
            f"Expected --batch_size and --num_inference_steps >= 1, got {args.batch_size} and "
            f"{args.num_inference_steps}."
        )
    if args.compile and args.warmup < 1:
        raise ValueError("Expected --warmup >= 1 with --compile, got 0: the first call of each kind compiles.")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("sampling.py", argv)
    torch.manual_seed(args.seed)

    sample_size = latent_size(args.preset, args.tokens)
    with torch.device(args.device):
        transformer = TREADTransformer2DModel.from_preset(args.preset, sample_size=sample_size)
    transformer.to(DTYPES[args.dtype]).eval()
    if args.compile:
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    rows = [row for name in SAMPLERS for row in measure(name, transformer, args)]
    finish_report(report, args, rows=rows)
    print(table(report))
    return report


def measure(name: str, transformer: TREADTransformer2DModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a sampler: seconds per image of each kind of guidance, taken in turns."""
    objective, kinds = SAMPLERS[name]
    transformer.register_to_config(objective=objective.name)
    pipe = TREADPipeline(transformer, objective.scheduler())
    pipe.set_progress_bar_config(disable=True)
    guiders = {kind: KINDS[kind]() for kind in kinds}
    labels, generator = list(range(args.batch_size)), torch.Generator().manual_seed(args.seed)

    def sample(guider: BaseGuidance) -> None:
        pipe.guider = guider
        pipe(labels, num_inference_steps=args.num_inference_steps, generator=generator, output_type="latent")

    calls = {kind: partial(sample, guider) for kind, guider in guiders.items()}
    next(iter(calls.values()))()  # the first call of all is slower, whatever it does
    times = time_in_turns(calls, args)
    memory = {kind: peak_memory(call, args.device) for kind, call in calls.items()}
    rows = []
    for kind, guider in guiders.items():
        seconds = [second / args.batch_size for second in times[kind]]
        speedup = statistics.median(times["CFG"]) / statistics.median(times[kind])
        allowed, apart = (
            1 / guidance_flops(transformer, guider, num_steps=pipe.num_timesteps, shared_prefix=shared).share_of_cfg
            for shared in (True, False)
        )
        rows.append(
            {
                "sampler": name,
                "guidance": kind,
                "predictions": pipe.num_timesteps,
                "seconds_per_image": summary(seconds),
                "images_per_second": 1 / statistics.median(seconds),
                "speedup_over_cfg": speedup,
                "speedup_of_turns": summary([c / s for c, s in zip(times["CFG"], times[kind], strict=True)]),
                "flops_speedup": allowed,
                "flops_speedup_apart": apart,
                "speedup_over_flops": speedup / allowed,
                "peak_memory_bytes": memory[kind],
            }
        )
    return rows


def peak_memory(call, device: str) -> int | None:
    """Bytes allocated at most in one more call; None where torch does not count them."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device)


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown: medians; the last column is what the FLOPs allow a loop that shares nothing."""
    lines = [
        "| sampler | guidance | s per image | images/s | speed over CFG | FLOPs allow | of it | nothing shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['sampler']} | {row['guidance']} | "
            f"{row['seconds_per_image']['median']:.3g} | {row['images_per_second']:.3g} | "
            f"{row['speedup_over_cfg']:.2f}× | {row['flops_speedup']:.2f}× | {row['speedup_over_flops']:.0%} | "
            f"{row['flops_speedup_apart']:.2f}× |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
