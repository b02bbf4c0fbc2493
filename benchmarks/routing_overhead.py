# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times what routing itself costs in `TREADTransformer2DModel`, beside one dense block and the step that it saves in.

    python benchmarks/routing_overhead.py --output benchmarks/results/routing_overhead_cpu.json

A routed step plans once, takes the kept tokens out before the route and puts them back after it, forward and backward.
"take_backward_writing" is the backward of taking them out if it wrote each gradient instead of adding it. Each part is
timed alone, beside the forward and backward of one of the preset's blocks on all tokens and on the kept ones. The step
is the sum of these blocks, with as many of each as the default route has.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import DTYPES, finish_report, make_parser, set_up, start_report, summary, time_in_turns

from diffusers_tread import RoutingCall, TREADTransformer2DModel, get_token_router
from diffusers_tread.routing import put_tokens, take_tokens


PARTS = ("plan", "take", "take_backward", "put", "put_backward")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5, warmup=1)
    add = parser.add_argument
    add("--preset", default="B/2", help="Whose width and blocks to take.")
    add("--shapes", default="1x256,8x256,2x1024,1x4096", help="Images x tokens, separated by commas.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Of tokens and weights.")
    args = parser.parse_args(argv)
    set_up(args)
    try:
        args.shapes = [[int(size) for size in shape.split("x")] for shape in args.shapes.split(",")]
        wrong = [shape for shape in args.shapes if len(shape) != 2 or shape[0] < 1 or shape[1] < 2]
    except ValueError:
        wrong = args.shapes
    if wrong:
        raise ValueError(f"Expected --shapes such as 8x256,2x4096 (images x tokens), got {wrong}.")
    if not 0.0 < args.selection_ratio < 1.0:
        raise ValueError(f"Expected --selection_ratio in (0, 1), got {args.selection_ratio}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("routing_overhead.py", argv)
    torch.manual_seed(args.seed)
    model = TREADTransformer2DModel.from_preset(args.preset).to(args.device, DTYPES[args.dtype]).train()
    rows = []
    for batch_size, num_tokens in args.shapes:
        rows.append(measure(model, batch_size, num_tokens, args))
        print(format_row(rows[-1]), flush=True)
    return finish_report(report, args, rows=rows)


def measure(
    model: TREADTransformer2DModel, batch_size: int, num_tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: microseconds of each part of routing and of a block, in turns, and what share the parts have."""
    steps = make_steps(model, batch_size, num_tokens, args)
    times = {name: [1e6 * value for value in values] for name, values in time_in_turns(steps, args).items()}
    medians = {name: summary(values)["median"] for name, values in times.items()}

    (route,) = model.token_router.routes
    num_routed = route.end - route.start + 1
    routing = sum(medians[part] for part in PARTS)
    blocks = (len(model.transformer_blocks) - num_routed) * medians["block"] + num_routed * medians["routed_block"]
    return {
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "width": model.position_table.shape[1],
        **{f"{name}_microseconds": summary(values) for name, values in times.items()},
        "routing_microseconds": routing,
        "share_of_block": routing / medians["block"],
        "share_of_routed_step": routing / (routing + blocks),
    }


def make_steps(
    model: TREADTransformer2DModel, batch_size: int, num_tokens: int, args: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: the parts of routing, and a block's forward and backward over all or kept tokens."""
    router, block, width = get_token_router(model), model.transformer_blocks[0], model.position_table.shape[1]
    call = RoutingCall(selection_ratio=args.selection_ratio, seed=args.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device, dtype=DTYPES[args.dtype], requires_grad=True)

    tokens, conditioning = random(batch_size, num_tokens, width), random(batch_size, width)  # B N D, B D
    (ids,) = router.plan(tokens, training=True, call=call)
    flat_ids = (ids + torch.arange(batch_size, device=ids.device).unsqueeze(1) * num_tokens).flatten()  # B*K
    kept = random(batch_size, ids.shape[1], width)  # B K D
    taken, put = take_tokens(tokens, ids), put_tokens(tokens, ids, kept)
    tokens_gradient, kept_gradient = torch.randn_like(tokens), torch.randn_like(kept)

    def run_block(inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        wanted = (inputs, conditioning, *block.parameters())
        torch.autograd.grad(block(inputs, conditioning), wanted, gradient)

    return {
        "plan": lambda: router.plan(tokens, training=True, call=call),
        "take": lambda: take_tokens(tokens, ids),
        "take_backward": lambda: torch.autograd.grad(taken, tokens, kept_gradient, retain_graph=True),
        "take_backward_writing": lambda: tokens.new_zeros(batch_size * num_tokens, width).index_copy_(
            0, flat_ids, kept_gradient.flatten(0, 1)
        ),
        "put": lambda: put_tokens(tokens, ids, kept),
        "put_backward": lambda: torch.autograd.grad(put, (tokens, kept), tokens_gradient, retain_graph=True),
        "block": lambda: run_block(tokens, tokens_gradient),
        "routed_block": lambda: run_block(kept, kept_gradient),
    }


def format_row(row: dict[str, Any]) -> str:
    names = (*PARTS, "take_backward_writing", "block")
    parts = "  ".join(f"{part} {row[f'{part}_microseconds']['median']:.0f}" for part in names)
    return (
        f"{row['batch_size']} x {row['num_tokens']} x {row['width']}, us: {parts}; routing "
        f"{row['share_of_block']:.2%} of a block, {row['share_of_routed_step']:.3%} of a step"
    )


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown: medians."""
    names = [*PARTS, "block"]
    lines = [
        f"| images × tokens × width | {', µs | '.join(name.replace('_', ', ') for name in names)}, µs "
        "| routing / block | routing / step |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in report["rows"]:
        times = " | ".join(f"{row[f'{name}_microseconds']['median']:,.0f}" for name in names)
        lines.append(
            f"| {row['batch_size']} × {row['num_tokens']} × {row['width']} | {times} "
            f"| {row['share_of_block']:.2%} | {row['share_of_routed_step']:.3%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
