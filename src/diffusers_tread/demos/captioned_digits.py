# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Draws scikit-learn's digits, tilted, in coloured ink on coloured paper, with captions, and trains a judge of them.

For examples/demo_text.py.

Shapes: B images, S their side, A the four attributes.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm.auto import trange

from ..files import whole


SIZE, JUDGE_STEPS = 32, 500
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": "#e12323", "green": "#148c32", "blue": "#283ce1", "purple": "#8c28aa", "black": "#141419"}
PAPERS = {"white": "#f5f5f5", "yellow": "#fad750", "pink": "#faa5c3", "cyan": "#78dce6"}
TILTS = {"upright": 0, "tilted to the left": 28, "tilted to the right": -28}  # degrees
ATTRIBUTES = {"digit": DIGITS, "ink": tuple(INKS), "paper": tuple(PAPERS), "tilt": tuple(TILTS)}
PHRASES = (
    "a handwritten {digit} in {ink} ink on {paper} paper, {tilt}",
    "the digit {digit}, {tilt}, written in {ink} on a {paper} background",
    "{paper} paper with a {ink} {digit} that is {tilt}",
    "a {ink} {digit} on {paper}, {tilt}",
)

Scene = tuple[int, int, int, int]  # digit, ink, paper, tilt: indices in ATTRIBUTES


def split_handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Splits the indices of scikit-learn's 1,797 digits into 1,500 and the others."""
    order = np.random.default_rng(0).permutation(len(load_digits().target))
    return order[:1500], order[1500:]


def is_trained_on(scene: Scene) -> bool:
    """Whether a pair of digit and ink is trained on; one ink per digit, so two digits per ink, are left out."""
    digit, ink, _, _ = scene
    return digit % len(INKS) != ink


def draw(
    count: int, writers: np.ndarray, *, is_seen: bool | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draws images [B, 3, S, S] uint8 with their scenes [B, A] and captions.

    `is_seen` selects scenes that are trained on, or not; None for both.
    """
    # Possible scenes, and the handwriting of each digit.
    rng, digits = np.random.default_rng(seed), load_digits()
    scenes = [
        scene for scene in itertools.product(*(range(len(values)) for values in ATTRIBUTES.values()))
        if is_seen is None or is_trained_on(scene) == is_seen
    ]  # fmt: skip
    by_digit = [[writer for writer in writers if digits.target[writer] == digit] for digit in range(len(DIGITS))]

    # Random ones.
    chosen = [scenes[index] for index in rng.integers(len(scenes), size=count)]
    images = [paint(digits.images[rng.choice(by_digit[scene[0]])], scene, rng) for scene in chosen]
    captions = [describe(scene, rng.integers(len(PHRASES))) for scene in chosen]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(chosen), captions


def describe(scene: Scene, phrase: int) -> str:
    values = zip(ATTRIBUTES.items(), scene, strict=True)
    return PHRASES[phrase].format(**{name: words[index] for (name, words), index in values})


def paint(digit: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paints a digit [8, 8] in [0, 16] in its colours, enlarged and a little off the middle: [S, S, 3] uint8."""
    # Size, place and tilt.
    _, ink, paper, tilt = scene
    side = round(SIZE * rng.uniform(0.82, 0.94))
    stroke = PIL.Image.fromarray(np.rint(digit * 255 / 16).astype(np.uint8)).resize([side, side], PIL.Image.BICUBIC)
    canvas = PIL.Image.new("L", (SIZE, SIZE))
    canvas.paste(stroke, tuple((SIZE - side) // 2 + rng.integers(-1, 2, size=2)))
    canvas = canvas.rotate(list(TILTS.values())[tilt] + rng.uniform(-5, 5), resample=PIL.Image.BICUBIC)

    # Colours.
    share = np.clip(np.asarray(canvas)[..., None] / 150 - 0.34, 0, 1)  # of ink, with sharper edges; S S 1
    colours = [list(INKS.values())[ink], list(PAPERS.values())[paper]]
    inked, blank = (np.array(PIL.ImageColor.getrgb(colour)) + rng.normal(0, 6, size=3) for colour in colours)
    return np.rint(np.clip(share * inked + (1 - share) * blank, 0, 255)).astype(np.uint8)


def save_folder(folder: Path, pixels: torch.Tensor, captions: list[str]) -> None:
    """Writes PNGs and, last, a metadata.jsonl for `datasets` and the training script, unless they exist.

    Raises:
        ValueError: The folder has other captions.
    """
    names = [f"{index:05d}.png" for index in range(len(captions))]
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, captions, strict=True)]
    path, text = folder / "metadata.jsonl", "\n".join(rows) + "\n"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"Expected {len(rows)} images of these captions in {folder}, got others. Use another one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, to_images(pixels), strict=True):
        image.save(folder / name)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_images(pixels: torch.Tensor) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]


def to_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Converts uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train_judge(pixels: torch.Tensor, scenes: torch.Tensor) -> nn.Module:
    """Trains a convolutional network with a logit for each value of each attribute."""
    # The network.
    torch.manual_seed(1)
    layers, channels = [], 3
    for out_channels in (32, 64, 128):
        layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1))
        layers += [nn.GroupNorm(8, out_channels), nn.GELU()]
        channels = out_channels
    counts = [len(values) for values in ATTRIBUTES.values()]
    judge = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(96), nn.GELU(), nn.Linear(96, sum(counts)))
    judge(torch.zeros(1, 3, SIZE, SIZE))  # so that the lazy layer has its weights

    # The training.
    def loss(batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = judge(to_floats(batch)).split(counts, dim=1)
        losses = [F.cross_entropy(one, target) for one, target in zip(logits, targets.T, strict=True)]
        return torch.stack(losses).sum()

    fit(judge, loss, pixels, scenes, name="judge", num_steps=JUDGE_STEPS, batch_size=128, learning_rate=2e-3)
    return judge


def recognise(judge: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Recognises the scenes [B, A] of images."""
    logits = torch.cat([judge(to_floats(batch)) for batch in pixels.split(500)])
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return torch.stack([part.argmax(dim=1) for part in parts], dim=1)


def fit(
    network: nn.Module,
    loss,
    *tensors: torch.Tensor,
    name: str,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Trains a network on random batches of the tensors, then freezes it.

    `loss` maps a batch to a scalar; `name` is shown in the progress bar.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 20, 2 * (1 - step / num_steps), 1))
    for _ in trange(num_steps, desc=f"Training the {name}"):
        chosen = torch.randint(len(tensors[0]), (batch_size,))
        loss(*(tensor[chosen] for tensor in tensors)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval().requires_grad_(False)
