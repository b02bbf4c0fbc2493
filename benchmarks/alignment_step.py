# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times a training step with an alignment beside the bare one, dense and routed, and says what the FLOPs add.

    python benchmarks/alignment_step.py --preset S/2 --tokens 64 --batch_size 4 \\
        --output benchmarks/results/alignment_step_cpu.json

The step is that of examples/train_tread.py, starting from latents and images: encoder, forward, backward, AdamW. The
encoders are DINOv2 with random weights and 14 pixels for each token; the aligned block lies in the default route.
"stored" and "conv" read the last encoder's stored features instead of running it: "stored" with the same MLP, "conv"
with iREPA's convolution after the last block before the route. "ended" is a step with the MLP after `until_step`. All
kinds of step take turns.
"""

import argparse
import dataclasses
import itertools
from functools import partial
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary, time_in_turns
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from diffusers_tread import FlowMatchingObjective, RoutingCall
from diffusers_tread.flops import training_flops
from diffusers_tread.models import make_denoiser
from diffusers_tread.objectives import AlignmentLoss, DenoiserWithHeads
from diffusers_tread.objectives.terms.alignment import ConvProjector, make_projector
from diffusers_tread.objectives.terms.vision_encoder import VisionEncoder


# Widths of vision transformers with twelve blocks and heads of 64.
ENCODERS = {"tiny": 192, "small": 384, "base": 768}
STORED = ("stored", "conv")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=12, warmup=1)
    add = parser.add_argument
    add("--preset", default="S/2", help="Size of the model.")
    add("--tokens", type=int, default=64, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=4, help="Images per step.")
    add("--encoders", default="tiny,base", help=f"Some of {', '.join(ENCODERS)}, by commas.")
    add("--block", type=int, default=3, help="After which tokens are aligned, 0-based.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Of encoder and, by autocast, model.")
    args = parser.parse_args(argv)
    set_up(args)
    args.encoders = args.encoders.split(",")
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if unknown := sorted(set(args.encoders) - set(ENCODERS)):
        raise ValueError(f"Expected --encoders among {list(ENCODERS)}, got {unknown}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report, rows, steps, flops = start_report("alignment_step.py", argv), [], {}, {}
    torch.manual_seed(args.seed)
    side = latent_size(args.preset, args.tokens)
    model = make_denoiser(args.preset, sample_size=side, objective=FlowMatchingObjective.name)
    model.to(args.device).train()
    terms = {name: make_term(model, ENCODERS[name], args) for name in args.encoders}
    last = terms[args.encoders[-1]]
    terms["stored"], terms["conv"] = last, with_convolution(model, last, args)
    terms["ended"] = dataclasses.replace(last, until_step=1)

    # Steps, and their FLOPs for an image.
    kinds = {"routed": None, "dense": False}
    for name, term in {"bare": None, **terms}.items():
        step = make_step(model, term, args, is_stored=name in STORED)
        for kind, enabled in kinds.items():
            steps[name, kind] = partial(step, enabled)
            ratio = {} if enabled is None else {"selection_ratio": 0.0}
            flops[name, kind] = training_flops(model, **ratio) + added_flops(model, term, name, kind, args)
    times = time_in_turns(steps, args)
    for (name, kind), seconds in times.items():
        bare = times["bare", kind]
        ratios = [one / other for one, other in zip(seconds, bare, strict=True)]
        share = flops[name, kind] / flops["bare", kind]
        row = {"encoder": name, "kind": kind, "seconds": summary(seconds), "over_bare": summary(ratios)}
        rows.append(row | {"flops_over_bare": share})
        milliseconds, ratio = row["seconds"]["median"] * 1e3, row["over_bare"]["median"]
        print(f"{name:6} {kind:7} {milliseconds:7.0f} ms, {ratio:.2f} of the bare step, by FLOPs {share:.2f}")
    return finish_report(report, args, rows=rows)


def make_term(model: torch.nn.Module, width: int, args: argparse.Namespace) -> AlignmentLoss:
    config = Dinov2Config(hidden_size=width, num_attention_heads=width // 64, image_size=224, patch_size=14)
    encoder = VisionEncoder(Dinov2Model(config).to(DTYPES[args.dtype]), mean=[0.5] * 3, std=[0.2] * 3)
    projector = make_projector(model.patch_embedding.out_channels, 2048, width).to(args.device)
    routes = tuple(model.token_router.routes)
    options = {"routes": routes, "patch_size": model.config.patch_size}
    return AlignmentLoss(encoder=encoder, projectors={args.block: projector}, **options)


def with_convolution(model: torch.nn.Module, term: AlignmentLoss, args: argparse.Namespace) -> AlignmentLoss:
    """The term with a convolution after the last block before the route."""
    projector = ConvProjector(model.patch_embedding.out_channels, term.encoder.width).to(args.device)
    return dataclasses.replace(term, projectors={term.routes[0].start - 1: projector})


def make_step(model: torch.nn.Module, term: AlignmentLoss | None, args: argparse.Namespace, *, is_stored: bool):
    """A function that takes one training step on a fixed batch, routed as its argument says."""
    terms, config, device = [] if term is None else [term], model.config, torch.device(args.device)
    denoiser = DenoiserWithHeads(model, terms) if terms else model
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    latents = torch.randn(args.batch_size, config.in_channels, *[config.sample_size] * 2, device=device)
    seen = {"images": torch.rand(args.batch_size, 3, *[8 * config.sample_size] * 2, device=device) * 2 - 1}
    if is_stored:
        shape = args.batch_size, args.tokens, term.encoder.width
        seen = {"image_features": torch.randn(shape, dtype=torch.float16, device=device)}
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
    objective, seeds = FlowMatchingObjective(), itertools.count(args.seed)

    def step(enabled: bool | None) -> None:
        options = {"routing": RoutingCall(enabled=enabled, seed=next(seeds)), "step": 1, **seen}
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
            loss = objective.loss(denoiser, latents, class_labels=labels, terms=terms, **options).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def added_flops(
    model: torch.nn.Module, term: AlignmentLoss | None, name: str, kind: str, args: argparse.Namespace
) -> float:
    """Of the projector, forward and backward, and of the encoder's forward, for one image."""
    if term is None:
        return 0
    ((block, projector),) = term.projectors.items()
    (route,) = model.token_router.routes
    is_routed = kind == "routed" and route.start <= block <= route.end
    tokens = args.tokens * (1 - route.selection_ratio if is_routed else 1)
    flops = 6 * tokens * sum(weight.numel() for weight in projector.parameters() if weight.dim() > 1)
    if name not in ("ended", *STORED):
        side = int(args.tokens**0.5)
        with FlopCounterMode(display=False) as counter:
            term.encoder(torch.zeros(1, 3, 8, 8, device=args.device), (side, side))
        flops += counter.get_total_flops()
    return flops


if __name__ == "__main__":
    main()
