# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The memory of a training step by its batch: dense and routed, with and without gradient checkpointing.

    python benchmarks/memory.py --output benchmarks/results/memory_cpu.json
    python benchmarks/memory.py --preset XL/2 --batch_sizes 8,32 --check_batch_size 64 --search --device cuda \\
        --dtype bfloat16

A step is forward, backward and AdamW. Gradients and optimiser states exist from the start, as with DDP or accumulated
gradients. On a CPU each point is the peak resident memory (Linux' VmHWM) of its own process, which returns freed
tensors to the system, unlike glibc's default; on CUDA it is the peak that torch allocated. A line through
--batch_sizes gives the bytes per image and the fixed bytes (weights, gradients, states and, on a CPU, the libraries),
and from them the largest batch for --budget_gib; the point at --check_batch_size shows the line's error there.
--search finds the largest batch that runs on the device, by doubling and bisection.
"""

import argparse
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, start_report

from diffusers_tread import EDMObjective, RoutingCall, TREADTransformer2DModel


M_MMAP_THRESHOLD = -3  # malloc.h of glibc

KINDS = {
    "dense": {"routed": False, "checkpointing": False},
    "routed": {"routed": True, "checkpointing": False},
    "dense, checkpointing": {"routed": False, "checkpointing": True},
    "routed, checkpointing": {"routed": True, "checkpointing": True},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="S/2", help="Size of the model.")
    add("--tokens", type=int, default=256, help="Tokens per image, a square number.")
    add("--batch_sizes", default="2,4", help="At least two, separated by commas; the line goes through them.")
    add("--check_batch_size", type=int, default=8, help="Where the line is compared with a step.")
    add("--budget_gib", type=float, default=8.0, help="Memory for which the line's largest batch is given.")
    add("--search", action="store_true", help="Find the largest batch that runs; on CUDA only.")
    add("--device", default="cpu", help="cpu or cuda.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add("--workers", type=int, default=2, help="Processes at once, with a thread each; on a CPU.")
    add("--seed", type=int, default=0, help="Of weights, data and subsets.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    args = parser.parse_args(argv)

    args.batch_sizes = sorted({int(value) for value in args.batch_sizes.split(",")})
    if len(args.batch_sizes) < 2 or min(*args.batch_sizes, args.check_batch_size, args.workers) < 1:
        raise ValueError(
            f"Expected two --batch_sizes or more, and --check_batch_size and --workers >= 1, got {args.batch_sizes}, "
            f"{args.check_batch_size} and {args.workers}."
        )
    if args.check_batch_size in args.batch_sizes:
        raise ValueError(f"Expected a --check_batch_size that is not among {args.batch_sizes}, got one that is.")
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if torch.device(args.device).type not in ("cpu", "cuda"):
        raise ValueError(f"Expected cpu or cuda as --device, whose peak memory can be read, got {args.device!r}.")
    if args.search and torch.device(args.device).type != "cuda":
        raise ValueError("Expected --device cuda for --search: a CPU would begin to swap. Read the line's batch.")
    if args.budget_gib <= 0:
        raise ValueError(f"Expected --budget_gib > 0, got {args.budget_gib}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("memory.py", argv)
    batch_sizes = [*args.batch_sizes, args.check_batch_size]
    points = [(kind, batch_size) for kind in KINDS for batch_size in batch_sizes]
    if torch.device(args.device).type == "cpu":
        context = multiprocessing.get_context("forkserver")  # a process each, without importing torch each time
        context.set_forkserver_preload(["diffusers_tread"])
        with context.Pool(args.workers, maxtasksperchild=1) as pool:
            peaks = pool.starmap(partial(peak_resident_bytes, args), points, chunksize=1)
    else:
        peaks = [peak_allocated_bytes(args, *point) for point in points]

    rows = []
    for index, kind in enumerate(KINDS):
        of_kind = dict(zip(batch_sizes, peaks[index * len(batch_sizes) :], strict=False))
        rows.append({"kind": kind, **KINDS[kind], **fit(of_kind, args)})
        rows[-1]["largest_batch_found"] = search(partial(runs, args, kind)) if args.search else None
    finish_report(report, args, rows=rows)
    print(table(report))
    return report


def fit(peaks: dict[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """The least-squares line through the peaks at `--batch_sizes`, and what it says of other batches.

    The largest batch is None for a line that does not rise: the images need less than what the peaks vary by.
    """
    x = torch.tensor(args.batch_sizes, dtype=torch.float64)
    y = torch.tensor([peaks[batch_size] for batch_size in args.batch_sizes], dtype=torch.float64)
    per_image = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    fixed = (y.mean() - per_image * x.mean()).item()
    largest = max(int((args.budget_gib * 2**30 - fixed) // per_image), 0) if per_image > 0 else None
    at_check = fixed + per_image * args.check_batch_size
    return {
        "peak_bytes": {str(batch_size): peak for batch_size, peak in peaks.items()},
        "bytes_per_image": per_image,
        "fixed_bytes": fixed,
        "largest_batch_in_budget": largest,
        "line_over_measured_at_check": at_check / peaks[args.check_batch_size],
    }


# ---------------------------------------------------------------------------------------------------------- one point


def peak_resident_bytes(args: argparse.Namespace, kind: str, batch_size: int) -> int:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # tensors get pages of their own, for good
    make_step(args, kind, batch_size)()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def peak_allocated_bytes(args: argparse.Namespace, kind: str, batch_size: int) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    step = make_step(args, kind, batch_size)
    step()  # kernels that are chosen on the first call may want more
    torch.cuda.reset_peak_memory_stats(args.device)
    step()
    return torch.cuda.max_memory_allocated(args.device)


def runs(args: argparse.Namespace, kind: str, batch_size: int) -> bool:
    """Whether the device has the memory for a step."""
    try:
        peak_allocated_bytes(args, kind, batch_size)
    except torch.OutOfMemoryError:
        return False
    return True


def search(runs: Callable[[int], bool]) -> int:
    """The largest batch that runs, 0 if not even one image does: doubling, then bisection to 2 %."""
    good, bad = 0, 1
    while runs(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(good // 50, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


def make_step(args: argparse.Namespace, kind: str, batch_size: int) -> Callable[[], None]:
    """A function that takes one training step, with a model and optimiser states of its own."""
    torch.manual_seed(args.seed)
    device, side = torch.device(args.device), latent_size(args.preset, args.tokens)
    with device:
        model = TREADTransformer2DModel.from_preset(args.preset, sample_size=side).train()
    routing = RoutingCall(enabled=KINDS[kind]["routed"], seed=args.seed)
    if KINDS[kind]["checkpointing"]:
        model.enable_gradient_checkpointing()

    # With gradients of zero the optimiser makes its states.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    latents = torch.randn(batch_size, 4, side, side, device=device)  # B C H W
    labels = torch.randint(0, 1000, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
            loss = EDMObjective().loss(model, latents, class_labels=labels, routing=routing).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


# ---------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown."""
    settings = report["settings"]
    check, budget = settings["check_batch_size"], settings["budget_gib"]
    searched = settings["search"]
    lines = [
        f"| {settings['preset']}, {settings['tokens']} tokens, {settings['dtype']} | MiB per image | MiB besides "
        f"| largest batch in {budget:g} GiB | line over measured at {check} |" + " largest batch found |" * searched,
        "|---|---|---|---|---|" + "---|" * searched,
    ]
    for row in report["rows"]:
        line = (
            f"| {row['kind']} | {row['bytes_per_image'] / 2**20:,.1f} | {row['fixed_bytes'] / 2**20:,.0f} "
            f"| {row['largest_batch_in_budget'] or '-'} | {row['line_over_measured_at_check']:.1%} |"
        )
        lines.append(line + f" {row['largest_batch_found']} |" * searched)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
