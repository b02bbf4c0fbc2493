# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times a training step (forward, backward, AdamW) dense and routed, beside what the FLOPs allow and diffusers' DiT.

    python benchmarks/train_step.py --presets S/2,B/2 --tokens 256 --output benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --presets B/2,XL/2 --tokens 256,1024 --batch_size 128,32 \\
        --modes eager,compiled,blocks --device cuda --dtype bfloat16

The peer is diffusers' `DiTTransformer2DModel` of the same size with the same objective, data and optimiser. All steps
take turns, so that a change of the machine's speed affects all; medians and quartiles are reported. The FLOP ceiling
counts attention (`diffusers_tread.flops`); on a quiet machine measured/ceiling stays below 1, apart from noise. Close
other programs first, or you measure them too.

The FLOPs of a step are those of the model, without recomputation. Their rate is compared with the accelerator's data
sheet ("mfu") or, if that is not known, with the fastest square product of the same run ("share_of_matmul_rate").
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary, time_in_turns
from diffusers import DiTTransformer2DModel

from diffusers_tread import EDMObjective, RoutingCall, TREADTransformer2DModel
from diffusers_tread.flops import flop_ceiling, training_flops
from diffusers_tread.models import make_denoiser


MODES = ("eager", "compiled", "blocks")

# Dense bfloat16 FLOP/s of NVIDIA's data sheets, under the names that CUDA gives. Not for the PCIe and NVL cards.
VENDOR_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5, warmup=1)
    add = parser.add_argument
    add("--presets", default="S/2,B/2", help="Sizes, separated by commas.")
    add("--tokens", default="256", help="Tokens per image, square numbers separated by commas.")
    add("--batch_size", default="8", help="Images per step: one number, or one for each of --tokens.")
    add("--modes", default="eager", help=f"Some of {', '.join(MODES)} (as the trainer's --compile), by commas.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add(
        "--matmul_precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="Of float32 products, as torch.set_float32_matmul_precision takes it.",
    )
    add("--gradient_checkpointing", action="store_true", help="Recompute the blocks in the backward.")
    add("--peer", action=argparse.BooleanOptionalAction, default=True, help="Time diffusers' DiT as well.")
    args = parser.parse_args(argv)

    set_up(args)
    for name in ("presets", "modes"):
        setattr(args, name, [value.strip() for value in getattr(args, name).split(",")])
    args.tokens, args.batch_size = [list(map(int, value.split(","))) for value in (args.tokens, args.batch_size)]
    if unknown := sorted(set(args.modes) - set(MODES)):
        raise ValueError(f"Expected --modes among {list(MODES)}, got {unknown}.")
    for tokens in args.tokens:
        latent_size(args.presets[0], tokens)  # raises for a wrong number
    if min(args.batch_size) < 1 or len(args.batch_size) not in (1, len(args.tokens)):
        raise ValueError(f"Expected one --batch_size >= 1, or one for each of --tokens, got {args.batch_size}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("train_step.py", argv)
    torch.set_float32_matmul_precision(args.matmul_precision)
    peak = measure_peak(args)

    rows = []
    batch_sizes = args.batch_size * (len(args.tokens) // len(args.batch_size))
    print("model  tokens mode          dense    routed speed-up  ceiling quotient      DiT dense/DiT")
    for preset in args.presets:
        for num_tokens, batch_size in zip(args.tokens, batch_sizes, strict=True):
            for mode in args.modes:
                rows.append(measure(preset, num_tokens, batch_size, mode, peak, args))
                print(format_row(rows[-1]), flush=True)
    return finish_report(report, args, peak=peak, rows=rows)


# ---------------------------------------------------------------------------------------------------------- measuring


def measure_peak(args: argparse.Namespace) -> dict[str, Any]:
    """What rates are compared with: the fastest square product of this run and, where known, the data sheet."""
    device, rates = torch.device(args.device), []
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        left, right = torch.randn(2, size, size, device=device, dtype=DTYPES[args.dtype])
        seconds = time_in_turns({"product": lambda left=left, right=right: left @ right}, args, repeats=10)["product"]
        rates.append(2 * size**3 / min(seconds))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    vendor = VENDOR_PEAKS.get(name) if args.dtype == "bfloat16" else None
    return {"matmul_tflops": max(rates) / 1e12, "vendor_tflops": None if vendor is None else vendor / 1e12}


def measure(
    preset: str, num_tokens: int, batch_size: int, mode: str, peak: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the seconds of dense and routed steps and of the peer's, taken in turns."""
    torch.compiler.reset()  # the graphs of earlier rows would count towards dynamo's limit
    gc.collect()  # and their models, which refer to themselves once compiled, to the memory
    torch.manual_seed(args.seed)
    model, steps = make_steps(preset, num_tokens, batch_size, mode, args)
    memory = {f"{kind}_peak_bytes": peak_bytes(step, args.device) for kind, step in steps.items()}
    peer_problem = "not asked for"
    if args.peer:
        peer_step, peer_problem = make_peer_step(model, batch_size, mode, args)
        steps |= {"peer": peer_step} if peer_problem is None else {}
    times = time_in_turns(steps, args)

    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    ratios = {"dense": 0.0, "routed": args.selection_ratio}
    flops = {kind: batch_size * training_flops(model, selection_ratio=ratio) for kind, ratio in ratios.items()}
    speedup = medians["dense"] / medians["routed"]
    ceiling = flop_ceiling(model, selection_ratio=args.selection_ratio)
    row = {
        "preset": preset,
        "num_tokens": num_tokens,
        "batch_size": batch_size,
        "mode": mode,
        "dense_seconds": summary(times["dense"]),
        "routed_seconds": summary(times["routed"]),
        "speedup": speedup,
        "speedup_of_pairs": summary([d / r for d, r in zip(times["dense"], times["routed"], strict=True)]),
        "flop_ceiling": ceiling,
        "speedup_over_ceiling": speedup / ceiling,
        "peer_seconds": summary(times["peer"]) if "peer" in times else None,
        "dense_over_peer": medians["dense"] / medians["peer"] if "peer" in times else None,
        "peer_problem": peer_problem,
        **memory,
    }
    is_vendor = peak["vendor_tflops"] is not None
    share, fastest = ("mfu", peak["vendor_tflops"]) if is_vendor else ("share_of_matmul_rate", peak["matmul_tflops"])
    for kind in flops:
        tflops = flops[kind] / medians[kind] / 1e12
        row |= {
            f"{kind}_images_per_second": batch_size / medians[kind],
            f"{kind}_flops_per_step": flops[kind],
            f"{kind}_tflops": tflops,
            f"{kind}_{share}": tflops / fastest,
        }
    return row


def make_steps(preset: str, num_tokens: int, batch_size: int, mode: str, args: argparse.Namespace):
    """The model, and functions "dense" and "routed" that take one training step of it."""
    with torch.device(args.device):
        model = make_denoiser(preset, sample_size=latent_size(preset, num_tokens))
    step, seeds = make_step(model, batch_size, mode, args), itertools.count(args.seed)

    def with_routing(enabled: bool) -> None:
        # A fresh subset, without drawing inside a compiled forward.
        step(RoutingCall(enabled=enabled, selection_ratio=args.selection_ratio, seed=next(seeds)))

    return model, {"dense": lambda: with_routing(False), "routed": lambda: with_routing(True)}


def make_peer_step(model: TREADTransformer2DModel, batch_size: int, mode: str, args: argparse.Namespace):
    """A training step of diffusers' DiT of the model's size and None, or None and why there is none in this mode."""
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "sample_size", "patch_size")
    with torch.device(args.device):
        peer = DiTTransformer2DModel(
            **{name: model.config[name] for name in sizes}, num_embeds_ada_norm=model.config.num_classes
        )
    peer._repeated_blocks = ["BasicTransformerBlock"]  # which diffusers leaves out
    try:
        step = make_step(peer, batch_size, mode, args)
        step()
    except (RuntimeError, ValueError) as error:  # torch.compile's errors are RuntimeErrors
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return step, None


def make_step(model: torch.nn.Module, batch_size: int, mode: str, args: argparse.Namespace) -> Callable[..., None]:
    """A function that takes one training step on a fixed batch of random latents, routed as its argument says."""
    device = torch.device(args.device)
    model.to(device).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if mode == "compiled":
        model.compile(fullgraph=True, dynamic=False)
    elif mode == "blocks":
        model.compile_repeated_blocks(dynamic=False)

    side = model.config.sample_size
    latents = torch.randn(batch_size, model.config.in_channels, side, side, device=device)  # B C H W
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    objective = EDMObjective()

    def step(routing: RoutingCall | None = None) -> None:
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
            loss = objective.loss(model, latents, class_labels=labels, routing=routing).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """Most memory of the device that a step has in use, weights and optimiser included; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    step()  # makes the optimiser's states
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


# ---------------------------------------------------------------------------------------------------------- reporting


def format_row(row: dict[str, Any]) -> str:
    dense, routed = row["dense_seconds"]["median"], row["routed_seconds"]["median"]
    line = (
        f"{row['preset']:6} {row['num_tokens']:6} {row['mode']:9} {dense * 1e3:6.0f} ms {routed * 1e3:6.0f} ms "
        f"{row['speedup']:8.2f} {row['flop_ceiling']:8.2f} {row['speedup_over_ceiling']:8.0%}"
    )
    if row["peer_seconds"] is None:
        return f"{line}  {row['peer_problem']}"
    return f"{line} {row['peer_seconds']['median'] * 1e3:5.0f} ms {row['dense_over_peer']:9.2f}"


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown, medians."""
    rows, settings = report["rows"], report["settings"]
    dtype = settings["dtype"]
    if settings["matmul_precision"] != "highest":
        dtype += f", {settings['matmul_precision']} precision of products"
    share, of_what = next(
        (name, title)
        for name, title in (("mfu", "MFU"), ("share_of_matmul_rate", "share of the matmul rate"))
        if f"dense_{name}" in rows[0]
    )
    columns = {
        "model": lambda row: row["preset"],
        "tokens x images": lambda row: f"{row['num_tokens']} x {row['batch_size']}",
        "mode": lambda row: f"{row['mode']}, {dtype}",
        "dense, ms": lambda row: f"{row['dense_seconds']['median'] * 1e3:,.0f}",
        "routed, ms": lambda row: f"{row['routed_seconds']['median'] * 1e3:,.0f}",
        "speed-up": lambda row: f"{row['speedup']:.2f}",
        "of the ceiling": lambda row: f"{row['speedup_over_ceiling']:.0%} of {row['flop_ceiling']:.2f}",
        "images/s, dense and routed": lambda row: (
            f"{row['dense_images_per_second']:.1f}, {row['routed_images_per_second']:.1f}"
        ),
        f"{of_what}, dense and routed": lambda row: f"{row[f'dense_{share}']:.0%}, {row[f'routed_{share}']:.0%}",
        "diffusers' DiT, ms": lambda row: (
            "-" if row["peer_seconds"] is None else f"{row['peer_seconds']['median'] * 1e3:,.0f}"
        ),
        "dense over DiT": lambda row: "-" if row["dense_over_peer"] is None else f"{row['dense_over_peer']:.2f}",
    }
    if rows[0]["dense_peak_bytes"] is not None:
        columns["peak GiB, dense and routed"] = lambda row: (
            f"{row['dense_peak_bytes'] / 2**30:.1f}, {row['routed_peak_bytes'] / 2**30:.1f}"
        )
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
