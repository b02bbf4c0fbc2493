# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The runs of convergence.py: what a variant is, and a training that differs from others by its routes alone.

Draws depend only on the seed and the step, and are made before the run or on the device: no step waits for the device.

Shapes: B images of a batch, H and W their sides.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from common import DTYPES
from convergence_data import Images
from diffusers.training_utils import EMAModel

from diffusers_tread import FlowMatchingObjective, RoutingCall, TokenRoute, TREADTransformer2DModel, default_route
from diffusers_tread.flops import training_flops
from diffusers_tread.models import DENOISERS
from diffusers_tread.objectives import DenoiserWithHeads, LossTerm
from diffusers_tread.runs.ema import update_ema
from diffusers_tread.seeds import derive_seed


BASELINE = "dense"
ADAM_BETAS = (0.9, 0.99)
OPTIONS = {"ratio": float, "start": int, "end": int, "unit": str, "dense_end": float, "steps": float}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How one of the compared runs trains."""

    name: str
    """As it was asked for."""
    route: TokenRoute | None
    """None: dense. Its unit is that of the model's own default unless `unit` says otherwise."""
    unit: Literal["token", "row"] | None = None
    dense_end: float = 0.0
    """Share of the steps, the last ones, that are dense, in [0, 1)."""
    steps: float = 1.0
    """Steps over those of the other runs: a route's FLOP ceiling gives it as many FLOPs as a dense run has."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model besides those that the flags give."""

    @classmethod
    def parse(cls, text: str, *, depth: int) -> "Variant":
        """Reads "dense", "routed" or changes of the default route joined by "+", such as "ratio=0.75+dense_end=0.15".

        Raises:
            ValueError: An unknown word, or a value out of range.
        """
        kind, *changes = text.split("+")
        if kind not in (BASELINE, "routed"):
            kind, changes = "routed", [kind, *changes]
        known = {"steps": float} if kind == BASELINE else OPTIONS
        values = {}
        for change in changes:
            name, _, number = change.partition("=")
            try:
                values[name] = known[name](number)
            except (KeyError, ValueError):
                raise ValueError(
                    f"Expected {BASELINE}, routed or changes of the route joined by +, such as ratio=0.25+start=0, "
                    f"got {text!r}. What can follow {kind} as NAME=NUMBER: {', '.join(known)}."
                ) from None
        others = {name: values.pop(name) for name in ("dense_end", "steps", "unit") if name in values}
        if not 0 <= others.get("dense_end", 0) < 1 or others.get("steps", 1) <= 0:
            raise ValueError(f"Expected dense_end in [0, 1) and steps > 0, got {text!r}.")

        if kind == BASELINE:
            return cls(name=text, route=None, **others)
        if "ratio" in values:
            values["selection_ratio"] = values.pop("ratio")
        route = TokenRoute(**default_route(depth).to_dict() | values)
        return cls(name=text, route=route.resolve(depth), **others)

    def num_steps(self, steps: int) -> int:
        return round(self.steps * steps)

    def num_routed_steps(self, steps: int) -> int:
        """The first so many steps of the run route."""
        return 0 if self.route is None else round((1 - self.dense_end) * self.num_steps(steps))

    def stops(self, args: argparse.Namespace) -> list[int]:
        """The steps after which the run is judged, the last one included."""
        num_steps = self.num_steps(args.steps)
        return [round(num_steps * number / args.evaluations) for number in range(1, args.evaluations + 1)]


def make_model(args: argparse.Namespace, variant: Variant, seed: int, *, size: int, num_classes: int):
    """On the CPU; its weights depend on the seed, not on the variant."""
    if args.model is None:
        config = {"num_attention_heads": args.heads, "attention_head_dim": args.width // args.heads}
    else:
        config = json.loads(args.model)
    kind = DENOISERS[config.pop("_class_name", TREADTransformer2DModel.__name__)]
    routes = None if variant.route is None else [replace(variant.route, unit=variant.unit or kind._route_unit)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return kind(
            num_layers=args.depth,
            in_channels=3,
            sample_size=size,
            patch_size=args.patch_size,
            num_classes=num_classes,
            routes=routes,
            objective="flow",
            **config | variant.model_options,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """What all variants of a seed draw, per step, on the device."""

    order: torch.Tensor
    """[steps, B] int64, which images a step sees: epochs, shuffled."""
    dropped: torch.Tensor
    """[steps, B] bool, which of their labels become the null class."""
    routing: torch.Tensor
    """[steps] int64, the router's seeds."""

    @classmethod
    def make(cls, args: argparse.Namespace, seed: int, *, steps: int, num_images: int) -> "Draws":
        def generator(purpose: str) -> torch.Generator:
            return torch.Generator().manual_seed(derive_seed(seed, purpose))

        shape, order = (steps, args.batch_size), generator("order")
        num_epochs = -(-steps * args.batch_size // num_images)
        epochs = torch.cat([torch.randperm(num_images, generator=order) for _ in range(num_epochs)])
        return cls(
            order=epochs[: steps * args.batch_size].view(shape).to(args.device),
            dropped=(torch.rand(shape, generator=generator("labels")) < args.label_drop).to(args.device),
            routing=torch.randint(2**62, (steps,), generator=generator("routing")).to(args.device),
        )


class Run:
    """One variant's training with one seed.

    Args:
        args: Flags of convergence.py.
        variant: What it routes.
        seed: Of weights and draws.
        images: [N, 3, H, W] uint8, on the device.
        labels: [N], on the device.
        draws: Of this seed, for at least as many steps.
        num_classes: Classes of the labels.
    """

    def __init__(self, args, variant: Variant, seed: int, *, images, labels, draws: Draws, num_classes: int):
        self.args, self.variant, self.seed = args, variant, seed
        self.images, self.labels, self.draws, self.num_classes = images, labels, draws, num_classes
        self.num_steps, self.num_routed = variant.num_steps(args.steps), variant.num_routed_steps(args.steps)
        self.model = make_model(args, variant, seed, size=images.shape[-1], num_classes=num_classes).to(args.device)
        self.parameters = list(self.model.parameters())
        self.ema = EMAModel(self.parameters, decay=args.ema_decay)
        self.averaged = share_averages(self.model, self.ema)
        if args.compile:
            for model in (self.model, self.averaged):
                model.compile_repeated_blocks(dynamic=False)
        self.terms = self.make_terms()
        self.denoiser = DenoiserWithHeads(self.model, self.terms) if self.terms else self.model
        self.trained = list(self.denoiser.parameters())
        self.optimizer = self.make_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.objective, self.generator = FlowMatchingObjective(), torch.Generator(args.device)
        self.loss_sum = torch.zeros((), device=args.device)
        # One thread on the CPU is timed by what it computed, so that other programs count little.
        alone = args.threads == 1 and torch.device(args.device).type == "cpu"
        self.clock = time.process_time if alone else time.perf_counter

    def make_terms(self) -> list[LossTerm]:
        """Of the loss, beside the denoising."""
        return []

    def make_optimizer(self) -> torch.optim.Optimizer:
        """With the largest learning rate of each group."""
        return torch.optim.AdamW(self.trained, lr=self.args.lr, betas=ADAM_BETAS, weight_decay=0, fused=True)

    def schedule(self, step: int) -> float:
        """The share of the learning rate: rises over the warm-up, falls to zero over the decay, both on a line."""
        decay = max(self.args.decay * self.num_steps, 1)
        return min((step + 1) / max(self.args.warmup_steps, 1), (self.num_steps - step) / decay, 1.0)

    def step(self, step: int) -> None:
        """One optimiser step, which does not wait for the device."""
        # Batch.
        order = self.draws.order[step]
        pixels = to_floats(self.images[order])  # B 3 H W
        labels = self.labels[order].masked_fill(self.draws.dropped[step], self.num_classes)
        self.generator.manual_seed(derive_seed(self.seed, "noise", step))
        routing = RoutingCall(enabled=step < self.num_routed, seed=self.draws.routing[step])

        # Loss and update.
        with autocast(self.args):
            options = {"generator": self.generator, "routing": routing, "images": pixels, "step": step}
            losses = self.objective.loss(self.denoiser, pixels, class_labels=labels, terms=self.terms, **options)
            loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.parameters)
        self.loss_sum += loss.detach()

    def train(self, evaluate: Callable[["Run", int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Trains and gives a point at the start and at each evaluation: step, seconds, FLOPs, losses, what was judged.

        Args:
            evaluate: Judges the averaged weights at the evaluation of this number, 0 at the start; its time does not
                count.

        Raises:
            ValueError: The training's loss is not finite.
        """
        self.model.train()
        yield {"step": 0, "seconds": 0.0, "flops": 0, "train_loss": None, **evaluate(self, 0)}
        done, seconds = 0, 0.0
        for number, last in enumerate(self.variant.stops(self.args), 1):
            start = self.clock()
            for step in range(done, last):
                self.step(step)
            loss = self.loss_sum.item() / (last - done)  # waits until all is done
            seconds += self.clock() - start

            if not math.isfinite(loss):
                raise ValueError(
                    f"Expected a finite loss, got {loss} in steps {done} to {last} of {self.variant.name}, seed "
                    f"{self.seed}. Lower --lr."
                )
            self.loss_sum.zero_()
            done = last
            values = {"step": done, "seconds": seconds, "flops": self.flops(done), "train_loss": loss}
            yield values | evaluate(self, number)

    @cached_property
    def step_flops(self) -> dict[bool, int]:
        """FLOPs of a step that is routed (True) or not."""
        ratios = {True: None, False: 0.0}
        return {
            kind: self.args.batch_size * training_flops(self.model, selection_ratio=ratio)
            for kind, ratio in ratios.items()
        }

    def flops(self, step: int) -> int:
        """Of the training's first steps."""
        num_routed = min(step, self.num_routed)
        return num_routed * self.step_flops[True] + (step - num_routed) * self.step_flops[False]

    def warm_up(self) -> None:
        """Takes steps of each kind, for what only first times cost; call it on a run that is thrown away."""
        self.model.train()
        has_both = 0 < self.num_routed < self.num_steps
        for step in (0, self.num_steps - 1) if has_both else (0,):
            for _ in range(self.args.warmup):
                self.step(step)
        synchronize(self.args.device)


def share_averages(model: TREADTransformer2DModel, ema: EMAModel) -> TREADTransformer2DModel:
    """A model in evaluation mode, dense, whose weights are always those that `ema` holds."""
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter, average in zip(averaged.parameters(), ema.shadow_params, strict=True):
        parameter.data = average
    return averaged


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, DTYPES[args.dtype], enabled=args.dtype != "float32")


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_device(images: Images, device: str) -> dict[str, torch.Tensor]:
    """The arrays of images, [N, 3, H, W], and labels by their names, as tensors on the device."""
    arrays = {name: torch.from_numpy(value) for name, value in vars(images).items() if name != "class_names"}
    arrays = {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in arrays.items()}
    return {name: value.contiguous().to(device) for name, value in arrays.items()}
