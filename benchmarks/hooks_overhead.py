# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times `apply_token_routing`: its cost per block, and training steps of diffusers' own Flux and SD3.

    python benchmarks/hooks_overhead.py --output benchmarks/results/hooks_overhead_cpu.json

The cost per block is measured on blocks that do nothing else. The steps (forward, backward, AdamW; dense and routed in
turns) are compared with their FLOP ceiling, counted by torch's FlopCounterMode with attention. Close other programs
first.
"""

import argparse
import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import finish_report, make_parser, set_up, start_report, summary, time_in_turns
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from diffusers_tread import (
    BlockSpec,
    RoutingCall,
    TokenRoute,
    apply_token_routing,
    register_block_spec,
    token_routing,
)
from diffusers_tread.flops import flop_ceiling


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=15, warmup=3)
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="Image tokens of the training steps, a square number.")
    add("--batch_size", type=int, default=2, help="Images per step.")
    add("--width", type=int, default=384, help="Of the transformers, a multiple of 64; they have 12 blocks.")
    args = parser.parse_args(argv)
    set_up(args)
    if args.tokens < 16 or round(args.tokens**0.5) ** 2 != args.tokens:
        raise ValueError(f"Expected a square number >= 16 for --tokens, such as 1024, got {args.tokens}.")
    if args.width < 64 or args.width % 64:
        raise ValueError(f"Expected a multiple of 64 for --width, got {args.width}.")
    if args.batch_size < 1:
        raise ValueError(f"Expected --batch_size >= 1, got {args.batch_size}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("hooks_overhead.py", argv)
    torch.manual_seed(args.seed)

    overhead = measure_overhead(args)
    for name, microseconds in overhead.items():
        print(f"{name:24} {microseconds:6.1f} us per block")
    rows = [measure_step(name, make, args) for name, make in {"Flux": make_flux, "SD3": make_sd3}.items()]

    return finish_report(report, args, overhead_microseconds_per_block=overhead, rows=rows)


# ---------------------------------------------------------------------------------------------------- cost per block


class EmptyBlock(torch.nn.Module):
    """Takes the arguments of a block with rotary tables and does nothing."""

    def forward(self, hidden_states, image_rotary_emb):
        return hidden_states


class EmptyModel(torch.nn.Module):
    def __init__(self, num_blocks: int):
        super().__init__()
        self.blocks = torch.nn.ModuleList(EmptyBlock() for _ in range(num_blocks))

    def forward(self, hidden_states, image_rotary_emb):
        for block in self.blocks:
            hidden_states = block(hidden_states, image_rotary_emb=image_rotary_emb)
        return hidden_states


def measure_overhead(args: argparse.Namespace, *, num_blocks: int = 103) -> dict[str, float]:
    """Microseconds that routing adds to a block: switched off, and on with the smallest stream there is."""
    register_block_spec("EmptyBlock", BlockSpec(tokens={"image_rotary_emb": 0}))
    plain, routed = EmptyModel(num_blocks), EmptyModel(num_blocks)
    apply_token_routing(routed, TokenRoute(start=0, end=num_blocks - 4))  # 100 blocks
    inputs = torch.randn(2, 16, 8), (torch.randn(16, 8), torch.randn(16, 8))

    def seconds(model: torch.nn.Module, **settings: Any) -> float:
        times = []
        with torch.no_grad():
            for _ in range(args.warmup + args.repeats):
                if settings:
                    with token_routing(model, **settings):
                        start = time.perf_counter()
                        model(*inputs)
                else:
                    start = time.perf_counter()
                    model(*inputs)
                times.append(time.perf_counter() - start)
        return statistics.median(times[args.warmup :])

    nothing = seconds(plain)
    return {
        "off": 1e4 * (seconds(routed, enabled=False) - nothing),
        "on, one subset": 1e4 * (seconds(routed, enabled=True, seed=0, shared_subset=True) - nothing),
        "on, subset per sample": 1e4 * (seconds(routed, enabled=True, seed=0) - nothing),
    }


# ----------------------------------------------------------------------------------------------------- training steps


def make_flux(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=args.width // 64,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    side = round(args.tokens**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    inputs = {
        "hidden_states": torch.randn(args.batch_size, args.tokens, 16),
        "encoder_hidden_states": torch.randn(args.batch_size, 64, 256),
        "pooled_projections": torch.randn(args.batch_size, 64),
        "timestep": torch.rand(args.batch_size),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(64, 3),
    }
    return model, inputs


def make_sd3(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    side = 2 * round(args.tokens**0.5)
    model = SD3Transformer2DModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        attention_head_dim=64,
        num_attention_heads=args.width // 64,
        joint_attention_dim=256,
        caption_projection_dim=args.width,
        pooled_projection_dim=64,
        pos_embed_max_size=side // 2,
    )
    inputs = {
        "hidden_states": torch.randn(args.batch_size, 4, side, side),
        "encoder_hidden_states": torch.randn(args.batch_size, 64, 256),
        "pooled_projections": torch.randn(args.batch_size, 64),
        "timestep": 1000 * torch.rand(args.batch_size),
    }
    return model, inputs


def measure_step(name: str, make, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of dense and routed steps, taken in turns, beside the FLOP ceiling."""
    model, inputs = make(args)
    model.to(args.device).train()
    inputs = {key: value.to(args.device) for key, value in inputs.items()}
    apply_token_routing(model, TokenRoute(start=2, end=-4))
    seeds = itertools.count(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(routed: bool) -> None:
        routing = RoutingCall(enabled=routed, seed=next(seeds))
        model(**inputs, routing=routing, return_dict=False)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ceiling = flop_ceiling(model, inputs)
    times = time_in_turns({"dense": partial(step, False), "routed": partial(step, True)}, args)
    speedup = statistics.median(times["dense"]) / statistics.median(times["routed"])
    print(f"{name:5} {args.tokens} tokens: speed-up {speedup:.2f}, ceiling {ceiling:.2f}, {speedup / ceiling:.0%}")
    return {
        "model": name,
        "num_tokens": args.tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dense_seconds": summary(times["dense"]),
        "routed_seconds": summary(times["routed"]),
        "speedup": speedup,
        "flop_ceiling": ceiling,
        "speedup_over_ceiling": speedup / ceiling,
    }


def table(report: dict[str, Any]) -> str:
    """The steps and the cost per block as Markdown, medians."""
    settings = report["settings"]
    kind = f"12 blocks of width {settings['width']}, {settings['tokens']:,} image tokens x {settings['batch_size']}"
    lines = [f"| {kind} | dense, ms | routed, ms | speed-up | of the ceiling |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        dense, routed = (row[f"{name}_seconds"]["median"] * 1e3 for name in ("dense", "routed"))
        of_ceiling = f"{row['speedup_over_ceiling']:.0%} of {row['flop_ceiling']:.2f}"
        lines.append(f"| {row['model']} | {dense:,.0f} | {routed:,.0f} | {row['speedup']:.2f} | {of_ceiling} |")
    lines += ["", "| routing of a block that does nothing | µs per block |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in report["overhead_microseconds_per_block"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
