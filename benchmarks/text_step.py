# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times a training step of text-to-image presets dense and routed, beside what the FLOPs allow.

    python benchmarks/text_step.py --presets prx-s,sd3-s --tokens 1024 --output benchmarks/results/text_step_cpu.json

The step is that of examples/train_text_to_image_tread.py, starting from latents and encoded captions: forward through
the pipeline's own call, backward, AdamW. The captions are random numbers of the length that the pipeline encodes to
(256 tokens for PRX, 333 for Stable Diffusion 3); encoding them takes the same time dense and routed and is left out.
Dense and routed steps take turns. The FLOP ceiling counts attention and the text's tokens.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary, time_in_turns

from diffusers_tread import FlowMatchingObjective, RoutingCall, apply_token_routing, compile_blocks
from diffusers_tread.flops import flop_ceiling, training_flops
from diffusers_tread.runs.text_config import TEXT_PRESETS
from diffusers_tread.text import PIPELINES, PipelineDenoiser, make_transformer


# Tokens of a caption as the pipelines encode it by default.
TEXT_TOKENS = {"PRXTransformer2DModel": 256, "SD3Transformer2DModel": 333}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5, warmup=1)
    add = parser.add_argument
    add("--presets", default="prx-s,sd3-s", help=f"Some of {', '.join(TEXT_PRESETS)}, by commas.")
    add("--tokens", type=int, default=1024, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=2, help="Images per step.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add("--end", type=int, default=-4, help="Last block of the route, which begins at 2; half the tokens skip it.")
    add("--compile", action="store_true", help="Compile the blocks by `compile_blocks`.")
    args = parser.parse_args(argv)
    set_up(args)
    args.presets = args.presets.split(",")
    latent_size("x/2", args.tokens)  # raises for a wrong number
    if unknown := sorted(set(args.presets) - set(TEXT_PRESETS)):
        raise ValueError(f"Expected --presets among {list(TEXT_PRESETS)}, got {unknown}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report, rows = start_report("text_step.py", argv), []
    for preset in args.presets:
        rows.append(measure(preset, args))
        print(table({"rows": rows[-1:], "settings": vars(args)}), flush=True)
    return finish_report(report, args, rows=rows)


def measure(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of dense and routed steps, taken in turns."""
    torch.manual_seed(args.seed)
    transformer = make_transformer(TEXT_PRESETS[preset]).to(args.device)
    route = apply_token_routing(transformer, {"start": 2, "end": args.end}).routes[0]
    if args.compile:
        torch.compiler.reset()  # the graphs of earlier rows would count towards dynamo's limit
        compile_blocks(transformer, dynamic=False)
    side = latent_size(f"x/{transformer.config.patch_size}", args.tokens)
    text = make_text(transformer, args.batch_size, args.device)
    denoiser = make_denoiser(transformer, side, make_text(transformer, 1, args.device))
    step, seeds = make_step(denoiser, side, text, args), itertools.count(args.seed)
    steps = {
        "dense": lambda: step(RoutingCall(enabled=False)),
        "routed": lambda: step(RoutingCall(enabled=True, seed=next(seeds))),
    }
    times = time_in_turns(steps, args)
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    speedup, ceiling = medians["dense"] / medians["routed"], flop_ceiling(transformer, denoiser.inputs)
    return {
        "preset": preset,
        "num_parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "num_blocks": transformer.token_router.num_layers,
        "route": [route.start, route.end],
        "num_tokens": args.tokens,
        "text_tokens": text[0].shape[1],
        "batch_size": args.batch_size,
        "dense_seconds": summary(times["dense"]),
        "routed_seconds": summary(times["routed"]),
        "dense_flops": training_flops(transformer, denoiser.inputs, selection_ratio=0.0),
        "speedup": speedup,
        "speedup_of_pairs": summary([d / r for d, r in zip(times["dense"], times["routed"], strict=True)]),
        "flop_ceiling": ceiling,
        "speedup_over_ceiling": speedup / ceiling,
    }


def make_text(transformer: torch.nn.Module, batch_size: int, device: str) -> tuple[Any, ...]:
    """Random numbers as the pipeline's `encode_prompt` would give them."""
    config, length = transformer.config, TEXT_TOKENS[type(transformer).__name__]
    if "context_in_dim" in config:
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        return torch.randn(batch_size, length, config.context_in_dim, device=device), mask, None, None
    pooled = torch.randn(batch_size, config.pooled_projection_dim, device=device)
    return torch.randn(batch_size, length, config.joint_attention_dim, device=device), None, pooled, None


def make_denoiser(transformer: torch.nn.Module, side: int, text: tuple[Any, ...]) -> PipelineDenoiser:
    """Of a pipeline without VAE and text encoders, which a step from latents on does not need."""
    import diffusers

    kind = getattr(diffusers, PIPELINES[type(transformer).__name__])
    parts = {name: None for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    parts |= {name: None for name in ("text_encoder_3", "tokenizer_3")}
    parts = {name: parts[name] for name in parts if name in kind.__init__.__annotations__}
    pipeline = kind(transformer=transformer, scheduler=FlowMatchingObjective().scheduler(), **parts)
    shape = (transformer.config.in_channels, side, side)
    return PipelineDenoiser(pipeline, latents_shape=shape, text=text, pixels_per_latent=8)


def make_step(denoiser: PipelineDenoiser, side: int, text: tuple[Any, ...], args: argparse.Namespace) -> Callable:
    """A function that takes one training step on a fixed batch of random latents, routed as its argument says."""
    device, objective = torch.device(args.device), FlowMatchingObjective()
    denoiser.train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    latents = torch.randn(args.batch_size, denoiser.transformer.config.in_channels, side, side, device=device)

    def step(routing: RoutingCall) -> None:
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
            loss = objective.loss(denoiser, latents, text=text, routing=routing).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown, medians."""
    head = ["model", "parameters", "route", "tokens, image and text", "dense, ms", "routed, ms", "speed-up"]
    lines = [[*head, "of the ceiling"], ["---"] * (len(head) + 1)]
    for row in report["rows"]:
        start, end = row["route"]
        cells = [row["preset"], f"{row['num_parameters'] / 1e6:.0f}M", f"{start} to {end} of {row['num_blocks']}"]
        cells += [f"{row['num_tokens']} and {row['text_tokens']}, {row['batch_size']} images"]
        cells += [f"{row[f'{kind}_seconds']['median'] * 1e3:,.0f}" for kind in ("dense", "routed")]
        share = f"{row['speedup_over_ceiling']:.0%} of {row['flop_ceiling']:.2f}"
        lines.append([*cells, f"{row['speedup']:.2f}", share])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
