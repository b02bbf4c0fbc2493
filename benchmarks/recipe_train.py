# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What recipe.py trains: a base with pieces, and the teacher that the alignment looks at.

Shapes: B images of a batch, H and W their sides, N tokens, E features of the teacher.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from convergence import Evaluation
from convergence_judge import convolution
from convergence_train import ADAM_BETAS, BASELINE, Run, Variant, autocast, to_floats
from torch import nn

from diffusers_tread import TokenRoute, default_route
from diffusers_tread.objectives import AlignmentLoss, LossTerm
from diffusers_tread.objectives.terms.alignment import make_projector
from diffusers_tread.runs.config import RunConfig
from diffusers_tread.runs.optimizers import make_optimizer
from diffusers_tread.seeds import derive_seed


BASES = (BASELINE, "tread", "sprint")
PIECES = ("modern", "align", "muon", "delayed")
# RMSNorm, SwiGLU, rotary positions, normalised queries and keys, value residual (docs/backbones.md).
MODERN = {
    "norm": "rms_norm", "qk_norm": "rms_norm", "ffn": "swiglu", "positions": "sincos+rope", "value_residual": True,
}  # fmt: skip
FEATURES = 128  # E
TEMPERATURE = 0.2  # of the contrastive loss


@dataclass(frozen=True, kw_only=True)
class Recipe(Variant):
    """A base, "dense", "tread" or "sprint", with pieces."""

    pieces: tuple[str, ...]
    """Some of `PIECES`."""
    ends: tuple[int, ...] = ()
    """Steps at which it has trained as long as the dense variant does, by several clocks; none while not known."""
    step_flops: int = 0
    """FLOPs of a step; 0 while they are not counted."""

    @classmethod
    def parse(cls, text: str, *, depth: int) -> "Recipe":
        """Reads a base with pieces joined by "+", such as "tread+modern+align".

        Raises:
            ValueError: An unknown word, a piece twice, or a delayed route of another base than "tread".
        """
        base, *pieces = text.split("+")
        if base not in BASES or len(set(pieces)) < len(pieces) or not set(pieces) <= set(PIECES):
            raise ValueError(
                f"Expected one of {', '.join(BASES)} and some of {', '.join(PIECES)}, joined by + as in "
                f"tread+modern+align, got {text!r}."
            )
        if "delayed" in pieces and base != "tread":
            raise ValueError(f"Expected a delayed route with tread, got {text!r}.")
        route = None if base == BASELINE else make_route(base, depth=depth, is_delayed="delayed" in pieces)
        options = MODERN if "modern" in pieces else {}
        return cls(name=text, route=route, model_options=dict(options), pieces=tuple(pieces))

    @property
    def base(self) -> str:
        return self.name.split("+")[0]

    def num_steps(self, steps: int) -> int:
        """As many as all others, or until it has trained as long as the dense variant."""
        return max((steps, *self.ends))

    def stops(self, args: argparse.Namespace) -> list[int]:
        """Evenly until the last step of all, and where equal time ends."""
        even = dataclasses.replace(self, ends=())
        return sorted({*Variant.stops(even, args), *self.ends})


def make_route(base: str, *, depth: int, is_delayed: bool) -> TokenRoute:
    """TREAD's default route, that one delayed by two blocks, or SPRINT's sparse middle (arXiv 2510.21986)."""
    if base == "sprint":
        route = TokenRoute(start=2, end=-3, selection_ratio=0.75, rejoin="fuse", path_drop=0.05)
        return route.resolve(depth)
    route = default_route(depth)
    delay = {"start": route.start + 2, "rejoin_from": route.start} if is_delayed else {}
    return dataclasses.replace(route, **delay).resolve(depth)


class RecipeRun(Run):
    """One recipe's training with one seed.

    Args:
        args: Flags of recipe.py.
        variant: What it trains.
        seed: Of weights and draws.
        teacher: What the alignment looks at.
        **others: As `Run` has them.
    """

    variant: Recipe

    def __init__(self, args: argparse.Namespace, variant: Recipe, seed: int, *, teacher: "Teacher", **others: Any):
        self.teacher = teacher
        super().__init__(args, variant, seed, **others)

    def make_terms(self) -> list[LossTerm]:
        """The alignment at `--align_block`, or at the first block of a route that begins later: on kept tokens."""
        if "align" not in self.variant.pieces:
            return []
        block = max(self.args.align_block, 0 if self.variant.route is None else self.variant.route.start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "projector"))
            projector = make_projector(self.args.width, self.args.projector_dim, FEATURES).to(self.args.device)
        return [
            AlignmentLoss(
                encoder=self.teacher,
                projectors={block: projector},
                routes=tuple(self.model.token_router.routes),
                patch_size=self.args.patch_size,
                weight=self.args.align_weight,
            )
        ]

    def make_optimizer(self) -> torch.optim.Optimizer:
        if "muon" not in self.variant.pieces:
            return super().make_optimizer()
        config = RunConfig(
            optimizer="muon",
            learning_rate=self.args.lr,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            muon_learning_rate=self.args.muon_lr,
            muon_adjust_lr_fn="match_rms_adamw",
        )
        return make_optimizer(config, self.denoiser)

    def flops(self, step: int) -> int:
        return step * self.variant.step_flops


class RecipeEvaluation(Evaluation):
    """Judges samples of all scales where equal steps end, of the first one at some steps before and at equal time."""

    def scales(self, run: Run, number: int) -> list[float]:
        args = run.args
        if number == 0 or args.samples_at == 0:
            return []
        step, even = (
            run.variant.stops(args)[number - 1],
            {round(args.steps * n / args.evaluations) for n in self.samples_at},
        )
        if step == args.steps:
            return args.guidance_scales
        return args.guidance_scales[:1] if step in even | {*run.variant.ends} else []


class Teacher(nn.Module):
    """A small convolutional network that was trained without labels, to tell an image from others in two crops of it
    (SimCLR, arXiv 2002.05709); it gives each token of the denoiser the features at its place."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            *convolution(3, 64, 1), *convolution(64, FEATURES, 2), *convolution(FEATURES, FEATURES, 1),
            *convolution(FEATURES, FEATURES, 1), nn.Conv2d(FEATURES, FEATURES, kernel_size=3, padding=1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.GELU(), nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, 64))
        self.register_buffer("mean", torch.zeros(1, FEATURES, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Features [B, N, E] float32, row by row, of images [B, 3, H, W] in [-1, 1]; over images their mean is 0."""
        maps = F.adaptive_avg_pool2d(self.network(images).float() - self.mean, grid_size)
        return maps.flatten(2).transpose(1, 2)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 64], of length one, what the contrastive loss compares."""
        return F.normalize(self.head(self.network(images).mean(dim=(2, 3))).float(), dim=1)


def train_teacher(args: argparse.Namespace, images: torch.Tensor) -> tuple[Teacher, dict[str, Any]]:
    """On the training images [N, 3, H, W] alone, with weights and draws of its own; and what the report says of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "teacher"))
        teacher = Teacher().to(args.device)
    generator = torch.Generator(args.device).manual_seed(derive_seed(0, "crops"))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.teacher_steps)
    for _ in range(args.teacher_steps):
        loss, share_found = contrast(args, teacher, images, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    # Centred, as features after a layer norm are: else all cosines are near one.
    teacher.eval().requires_grad_(False)
    with torch.no_grad(), autocast(args):
        maps = teacher.network(to_floats(images[:1000]))
    teacher.mean.copy_(maps.float().mean(dim=(0, 2, 3), keepdim=True))
    return teacher, {"loss": loss.item(), "share_found": share_found.item()}


def contrast(
    args: argparse.Namespace, teacher: Teacher, images: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch in which each of two crops is to find the other one, and the share of those that do."""
    draws = torch.randint(len(images), (args.teacher_batch_size,), generator=generator, device=args.device)
    pixels = to_floats(images[draws])
    with autocast(args):
        views = torch.cat([teacher.embed(augment(pixels, generator)) for _ in range(2)])  # 2B 64
    logits = views @ views.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    partners = torch.arange(len(views), device=views.device).roll(len(pixels))
    return F.cross_entropy(logits, partners), (logits.argmax(dim=1) == partners).float().mean()


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random crops of at least half the side, mirrored or not, with other colours; [B, 3, H, W] in and out."""
    draws = torch.rand(len(images), 10, generator=generator, device=images.device)
    scale = 0.5 + 0.5 * draws[:, 0]
    shift = (1 - scale)[:, None] * (2 * draws[:, 1:3] - 1)  # B 2
    mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)
    zeros = torch.zeros_like(scale)
    rows = [torch.stack(row, dim=1) for row in ((scale * mirror, zeros, shift[:, 0]), (zeros, scale, shift[:, 1]))]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, bias = 0.6 + 0.8 * draws[:, 4:7], 0.6 * draws[:, 7:10] - 0.3
    return crops * gain[:, :, None, None] + bias[:, :, None, None]
