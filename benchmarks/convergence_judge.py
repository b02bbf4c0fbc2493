# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What judges the runs of convergence.py: held-out loss by noise level, and a small classifier's view of samples.

Shapes: B images, H and W their sides, D features, K classes, L noise levels.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from convergence_train import autocast, to_floats
from torch import nn

from diffusers_tread import FlowMatchingObjective, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.metrics import FeatureStatistics, frechet_distance
from diffusers_tread.seeds import derive_seed


NUM_LEVELS = 10
NUM_FEATURES = 64


class HeldOutLoss:
    """The flow-matching loss of held-out images at the middles of `NUM_LEVELS` equal parts of the times [0, 1].

    Images, noise and times are the same in every call, so runs differ by their weights alone. Each level has images of
    its own.

    Args:
        args: Flags of convergence.py.
        images: [N, 3, H, W] uint8, on the device; where there are too few, they serve several levels.
        labels: [N], on the device.
    """

    def __init__(self, args: argparse.Namespace, *, images: torch.Tensor, labels: torch.Tensor):
        self.args, count = args, NUM_LEVELS * args.heldout_per_level
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen = order.repeat(-(-count // len(order)))[:count].to(args.device)
        self.images, self.labels = images[chosen], labels[chosen]
        generator = torch.Generator(args.device).manual_seed(0)
        self.noise = torch.randn(self.images.shape, generator=generator, device=args.device)
        times = (torch.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS
        self.times = times.repeat_interleave(args.heldout_per_level).to(args.device)

    @torch.no_grad()
    def __call__(self, model: TREADTransformer2DModel) -> list[float]:
        """The mean loss at each level, from little noise to much."""
        losses = []
        values = (self.images, self.labels, self.noise, self.times)
        for images, labels, noise, t in zip(
            *(value.split(self.args.eval_batch_size) for value in values), strict=True
        ):
            x, t_map = to_floats(images), t[:, None, None, None]
            with autocast(self.args):
                velocity = model((1 - t_map) * x + t_map * noise, 1000 * t, labels).sample
            losses.append((velocity.float() - (noise - x)).square().mean(dim=(1, 2, 3)))  # B
        return torch.cat(losses).view(NUM_LEVELS, -1).mean(dim=1).tolist()


def level_weights(objective: FlowMatchingObjective) -> torch.Tensor:
    """[L]: how often the training draws a time from each of the equal parts of [0, 1]; their sum is 1."""
    edges = torch.linspace(0, 1, NUM_LEVELS + 1, dtype=torch.float64)
    return torch.special.ndtr((edges.logit() - objective.logit_mean) / objective.logit_std).diff()


class Judge:
    """A classifier of the training's images, and held-out images to compare samples with.

    Of the held-out images of each class, one part takes the place of samples, the rest is the reference.

    Args:
        args: Flags of convergence.py.
        data: As `to_device` gives it.
        num_classes: K.

    Raises:
        ValueError: Too few held-out images.
    """

    def __init__(self, args: argparse.Namespace, *, data: dict[str, torch.Tensor], num_classes: int):
        self.args, self.num_classes = args, num_classes
        self.network = train_classifier(args, data["train_images"], data["train_labels"], num_classes=num_classes)

        # Held-out images, as many of each class.
        labels = data["heldout_labels"].cpu()
        by_class = [(labels == label).nonzero().flatten() for label in range(num_classes)]
        per_class, fewest = args.num_samples // num_classes, min(map(len, by_class))
        if args.num_samples % num_classes or per_class >= fewest:
            raise ValueError(
                f"Expected --num_samples divisible by the {num_classes} classes and below {fewest * num_classes}, so "
                f"that held-out images are left to compare with, got {args.num_samples}."
            )
        features, is_right = self.look(data["heldout_images"], data["heldout_labels"])
        features = features.cpu()
        real = torch.cat([chosen[:per_class] for chosen in by_class])
        rest = torch.cat([chosen[per_class:fewest] for chosen in by_class])
        self.reference = FeatureStatistics.from_features(features[rest])
        self.report = {
            "heldout_accuracy": is_right.float().mean().item(),
            "reference_images": len(rest),
            "samples": args.num_samples,
            "distance_of_real_images": self.distance(features[real]),
        }

    @torch.no_grad()
    def look(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, D] of uint8 images [N, 3, H, W], and whether each is recognised as what its label says [N]."""
        features = torch.cat([self.network[:-1](to_floats(batch)) for batch in images.split(500)])
        return features, self.network[-1](features).argmax(dim=1) == labels

    def distance(self, features: torch.Tensor) -> float:
        """The Fréchet distance to the reference."""
        return frechet_distance(FeatureStatistics.from_features(features), self.reference)

    def __call__(
        self, model: TREADTransformer2DModel, *, seed: int, scale: float
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Judges samples with a guidance scale; gives the verdict, and the samples as uint8 [N, 3, H, W]."""
        labels = torch.arange(self.args.num_samples, device=self.args.device) % self.num_classes
        images = sample(self.args, model, labels, seed=seed, scale=scale)
        features, is_right = self.look(images, labels)
        return {"distance": self.distance(features), "recognised": is_right.float().mean().item()}, images


def sample(
    args: argparse.Namespace, model: TREADTransformer2DModel, labels: torch.Tensor, *, seed: int, scale: float
) -> torch.Tensor:
    """Samples of these labels, uint8 [N, 3, H, W]; they start from the same noise in every call with this seed."""
    pipeline = TREADPipeline(transformer=model, scheduler=FlowMatchingObjective().scheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(args.device).manual_seed(derive_seed(seed, "samples"))
    images = []
    for batch in labels.split(args.eval_batch_size):
        with autocast(args):
            images.append(
                pipeline(
                    class_labels=batch,
                    num_inference_steps=args.sampling_steps,
                    guidance_scale=scale,
                    generator=generator,
                    output_type="pt",
                ).images
            )
    return (torch.cat(images) * 255).round().to(torch.uint8)


def train_classifier(
    args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor, *, num_classes: int
) -> nn.Sequential:
    """A small convolutional network, the same whatever else the flags say; what comes before its last layer gives
    `NUM_FEATURES` features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_classifier(num_classes).to(args.device)
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(images), (args.judge_steps, 128), generator=generator).to(args.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / args.judge_steps)))
    for chosen in order:
        F.cross_entropy(network(to_floats(images[chosen])), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval().requires_grad_(False)


def make_classifier(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *convolution(3, 32, 1),
        *convolution(32, 64, 2),
        *convolution(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, NUM_FEATURES),
        nn.GELU(),
        nn.Linear(NUM_FEATURES, num_classes),
    )


def convolution(channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    layer = nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1)
    return [layer, nn.GroupNorm(8, out_channels), nn.GELU()]
