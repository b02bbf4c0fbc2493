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
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_tread
from diffusers_tread import EDMObjective, TREADTransformer2DModel, get_token_router
from diffusers_tread.flops import flop_ceiling


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("eager", "compiled")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--presets", default="S/2,B/2", help="Sizes, separated by commas.")
    add("--tokens", default="256", help="Tokens per image, square numbers separated by commas.")
    add("--modes", default="eager", help="eager, compiled or both, separated by commas.")
    add("--batch_size", type=int, default=8, help="Images per step.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--device", default="cpu", help="cpu, cuda, mps, ...")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add("--repeats", type=int, default=15, help="Timed steps of each kind.")
    add("--warmup", type=int, default=3, help="Steps of each kind before.")
    add("--threads", type=int, help="Threads on the CPU; by default torch's choice.")
    add("--seed", type=int, default=0, help="Of weights, data and subsets.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    add("--plot", type=Path, help="PNG file to write; by default none.")
    args = parser.parse_args(argv)

    for name in ("presets", "modes"):
        setattr(args, name, [value.strip() for value in getattr(args, name).split(",")])
    args.tokens = [int(value) for value in args.tokens.split(",")]
    if unknown := sorted(set(args.modes) - set(MODES)):
        raise ValueError(f"Expected --modes among {list(MODES)}, got {unknown}.")
    if wrong := [tokens for tokens in args.tokens if tokens < 1 or round(tokens**0.5) ** 2 != tokens]:
        raise ValueError(f"Expected square numbers in --tokens, such as 256 or 1024, got {wrong}.")
    if args.batch_size < 1 or args.repeats < 2 or args.warmup < 0:
        raise ValueError(
            f"Expected --batch_size >= 1, --repeats >= 2 and --warmup >= 0, got {args.batch_size}, {args.repeats} and "
            f"{args.warmup}."
        )
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")

    rows = []
    print("model  tokens mode          dense    routed speed-up  ceiling quotient")
    for preset in args.presets:
        for tokens in args.tokens:
            for mode in args.modes:
                rows.append(measure(preset, tokens, mode, args))
                print(format_row(rows[-1]), flush=True)

    report = {
        "command": shlex.join(["python", "benchmarks/train_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "started": started,
        "hardware": hardware(args.device),
        "versions": versions(),
        "source": source_state(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "plot")},
        "rows": rows,
    }
    if args.output is not None:
        write_whole(args.output, (json.dumps(report, indent=2) + "\n").encode())
    if args.plot is not None:
        plot(rows, args.plot)
    return report


def measure(preset: str, num_tokens: int, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of dense and routed steps, taken in turns."""
    torch.manual_seed(args.seed)
    step, model = make_step(preset, num_tokens, mode, args)
    times = {"dense": [], "routed": []}
    for repeat in range(args.warmup + args.repeats):
        for kind, seconds in times.items():
            elapsed = timed(step, kind == "routed", args.device)
            if repeat >= args.warmup:
                seconds.append(elapsed)

    speedup = statistics.median(times["dense"]) / statistics.median(times["routed"])
    ceiling = flop_ceiling(model, num_tokens, selection_ratio=args.selection_ratio)
    return {
        "preset": preset,
        "num_tokens": num_tokens,
        "mode": mode,
        "dense_seconds": summary(times["dense"]),
        "routed_seconds": summary(times["routed"]),
        "speedup": speedup,
        "speedup_of_pairs": summary([a / b for a, b in zip(times["dense"], times["routed"], strict=True)]),
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


def timed(step, routed: bool, device: str) -> float:
    """Seconds of one step, until the device has done it."""
    start = time.perf_counter()
    step(routed)
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "first_quartile": low, "third_quartile": high, "min": min(values), "max": max(values)}


def format_row(row: dict[str, Any]) -> str:
    dense, routed = row["dense_seconds"]["median"], row["routed_seconds"]["median"]
    return (
        f"{row['preset']:6} {row['num_tokens']:6} {row['mode']:9} {dense * 1e3:6.0f} ms {routed * 1e3:6.0f} ms "
        f"{row['speedup']:8.2f} {row['flop_ceiling']:8.2f} {row['speedup_over_ceiling']:8.0%}"
    )


def hardware(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": device,
        "accelerator": name,
    }


def versions() -> dict[str, str]:
    packages = {"torch": torch, "diffusers": diffusers, "diffusers_tread": diffusers_tread}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in packages.items()}


def source_state() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def write_whole(path: Path, content: bytes) -> None:
    """Under a temporary name first, so that no half file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


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
