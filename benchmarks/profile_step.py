# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Says where the time of a training step goes: torch's profiler over dense and routed steps, by kind of operation.

    python benchmarks/profile_step.py --output benchmarks/results/profile_step_cpu.json
    python benchmarks/profile_step.py --preset XL/2 --batch_size 128 --device cuda --dtype bfloat16 --mode compiled

Times are those of a GPU's kernels, or the CPU's self time in each operation. Operations that a route cannot shorten
have a ratio of 1; the larger their share, the more they reduce the speed-up. On the CPU, where the shapes of arguments
are known, operations without tokens are a kind of their own: casts and gradients of weights, products of the
modulation. With the optimiser they are the weight-bound time W of the dense step; the rest is its token-bound time T.
The ceiling that counts both is (W + T) / (W + T / FLOP ceiling), reported beside the ratio of steps timed without the
profiler.
"""

import argparse
import re
import statistics
from collections import Counter, defaultdict
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary, time_in_turns
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import MODES, make_steps

from diffusers_tread.flops import flop_ceiling


# Kind to what its operations, or a GPU's kernels, are called; the first that fits counts. Compiled models fuse the
# last kinds into kernels of their own, "triton_*" on a GPU and "cpp_*" on the CPU.
WITHOUT_TOKENS = "without tokens: "  # in front of the names of such operations
KINDS = {
    "optimiser": r"aten::_fused_adamw|multi_tensor_apply",
    "without tokens": f"^{WITHOUT_TOKENS}",
    "fused kernels": r"^(triton|cpp)_",
    "linear layers": r"aten::(mm|addmm|bmm|convolution|mkldnn|cudnn_conv)|nvjet|gemm|cutlass|splitK",
    "attention": r"aten::_(scaled_dot_product|flash|cudnn_attention|efficient)|sdpa|flash|fmha|cudnn::fusion",
    "moving tokens": r"aten::(index|sort|topk)|index|[sS]ort|gatherTopK|radix",
    "activation": r"aten::(gelu|silu)|[gG]elu|[sS]ilu",
    "layer norm": r"aten::native_layer_norm|layer_norm",
    "sums, products, copies": r"aten::|at::native|Memcpy|Memset",
    "the rest": "",
}
SPAN = re.compile(r"aten::|autograd::|torch::|ProfilerStep|Optimizer\.|Command Buffer Full|## ")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3, warmup=1)
    add = parser.add_argument
    add("--preset", default="B/2", help="Size of the model.")
    add("--tokens", type=int, default=256, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=8, help="Images per step.")
    add("--mode", choices=MODES, default="eager", help="As train_step.py's.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    args = parser.parse_args(argv)
    set_up(args)
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if args.batch_size < 1:
        raise ValueError(f"Expected --batch_size >= 1, got {args.batch_size}.")
    args.gradient_checkpointing = False
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("profile_step.py", argv)
    torch.manual_seed(args.seed)
    model, steps = make_steps(args.preset, args.tokens, args.batch_size, args.mode, args)
    times = time_in_turns(steps, args)
    kept = {"dense": args.tokens, "routed": args.tokens - round(args.tokens * args.selection_ratio)}
    seconds = {kind: profile_step(step, kept[kind], args) for kind, step in steps.items()}

    totals = {kind: sum(operations.values()) for kind, operations in seconds.items()}
    rows = []
    for name in KINDS:
        dense, routed = (
            sum(one for operation, one in seconds[kind].items() if kind_of(operation) == name) for kind in seconds
        )
        rows.append({"kind": name, "dense_seconds": dense, "routed_seconds": routed})
        rows[-1] |= {f"{kind}_share": rows[-1][f"{kind}_seconds"] / totals[kind] for kind in totals}
    ceiling = flop_ceiling(model, selection_ratio=args.selection_ratio)
    report = finish_report(
        report,
        args,
        flop_ceiling=ceiling,
        ceiling_with_weights=None if is_gpu(args) else ceiling_with_weights(rows, ceiling),
        **{f"{kind}_seconds": summary(times[kind]) for kind in times},
        rows=[row for row in rows if row["dense_seconds"] or row["routed_seconds"]],
        operations={kind: dict(Counter(operations).most_common(25)) for kind, operations in seconds.items()},
    )
    print(table(report))
    for kind, operations in report["operations"].items():
        print(f"The longest of a {kind} step, ms:")
        for name, one in list(operations.items())[:10]:
            print(f"{1e3 * one:8.2f}  {name[:110]}")
    return report


def profile_step(step, num_kept: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step in each operation itself, on a GPU in each kernel; of `args.repeats` steps.

    Args:
        step: What is profiled.
        num_kept: Tokens of an image in the blocks of the route.
        args: Flags.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_gpu(args) else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=not is_gpu(args)) as profiler:
        for _ in range(args.repeats):
            step()
    seconds = Counter()
    if not is_gpu(args):
        calls = defaultdict(list)
        for event in profiler.events():
            name = event.key if has_tokens(event.input_shapes, num_kept, args) else WITHOUT_TOKENS + event.key
            calls[name, str(event.input_shapes)].append(1e-6 * event.self_cpu_time_total)
        for (name, _), times in calls.items():  # by medians: what interrupted a call is not its time
            seconds[name] += statistics.median(times) * len(times) / args.repeats
    else:  # beside the kernels there are spans that cover several, called as the operation or the profiler's own
        for event in profiler.key_averages():
            if event.device_type is not DeviceType.CPU and not SPAN.match(event.key):
                seconds[event.key] += 1e-6 * event.self_device_time_total / args.repeats
    return {name: time for name, time in seconds.items() if time > 0}


def is_gpu(args: argparse.Namespace) -> bool:
    return torch.device(args.device).type != "cpu"


def has_tokens(shapes: list[list[int]], num_kept: int, args: argparse.Namespace) -> bool:
    """Whether an argument has a row per token: of all images [B * N, D], or [B, N, D], [B, heads, N, D].

    Taken for such are operations without known shapes, of lists of tensors or of none, and widths that equal B * N.
    """
    counts, known = (args.tokens, num_kept), [shape for shape in shapes if shape]
    return not known or any(
        args.batch_size * n in shape or (len(shape) > 2 and n in shape) for shape in known for n in counts
    )


def ceiling_with_weights(rows: list[dict[str, Any]], flop_ceiling: float) -> float:
    """The speed-up if what tokens cost shrinks with the FLOPs, and the rest not at all."""
    total = sum(row["dense_seconds"] for row in rows)
    weights = sum(row["dense_seconds"] for row in rows if row["kind"] in ("optimiser", "without tokens"))
    return total / (weights + (total - weights) / flop_ceiling)


def kind_of(operation: str) -> str:
    return next(kind for kind, names in KINDS.items() if re.search(names, operation))


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    settings = report["settings"]
    title = f"{settings['preset']}, {settings['tokens']} tokens x {settings['batch_size']}, {settings['mode']}"
    lines = [f"| {title} | dense, ms | share | routed, ms | share | dense over routed |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        dense, routed = row["dense_seconds"], row["routed_seconds"]
        ratio = f"{dense / routed:.2f}" if routed else "-"
        lines.append(
            f"| {row['kind']} | {1e3 * dense:,.1f} | {row['dense_share']:.1%} | {1e3 * routed:,.1f} | "
            f"{row['routed_share']:.1%} | {ratio} |"
        )
    dense, routed = (sum(row[f"{kind}_seconds"] for row in report["rows"]) for kind in ("dense", "routed"))
    ratio = f"{dense / routed:.2f} (FLOPs: {report['flop_ceiling']:.2f})"
    lines.append(f"| all | {1e3 * dense:,.1f} | | {1e3 * routed:,.1f} | | {ratio} |")
    if ceiling := report.get("ceiling_with_weights"):
        dense, routed = (report[f"{kind}_seconds"]["median"] for kind in ("dense", "routed"))
        ratio = (
            f"{dense / routed:.2f}, {dense / routed / ceiling:.0%} of the {ceiling:.2f} that weights and FLOPs allow"
        )
        lines.append(f"| a step without the profiler | {1e3 * dense:,.1f} | | {1e3 * routed:,.1f} | | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
