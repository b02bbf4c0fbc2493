# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The card of a folder of latents, its README.md on the Hub."""

import json
import math
import shlex

from huggingface_hub import DatasetCard, DatasetCardData

from ...installation import how_to_install
from ...markdown import as_text
from .info import LatentsInfo


_TEXT = """\
# {title}

{num_samples:,} images at {pixels} pixels ({crop} crop), encoded by {vae}{flipped}, for training \
latent diffusion models with diffusers-tread.

| | |
|---|---|
| images | {source} |
| {conditions} |
| VAE | {vae}, {vae_class}, run in {vae_dtype}, revision {vae_revision} |
| a record | {content}, {shape}, {dtype}{bits} |
{features}| training uses | {formula} |
| left out as unreadable | {num_unreadable} |

`latents.json` holds all of this and the SHA-256 of every shard.

## Use

With diffusers-tread ({install}):

```bash
diffusers-tread {training}
```

With `datasets` alone:

```python
import torch
from datasets import load_dataset

records = load_dataset({repo_literal}, split="train").with_format("arrow")
table = records[:{rows}]
values = torch.tensor(table["moments"].combine_chunks().flatten().to_numpy()){view}
values = values.view(-1, {sizes}).float()
{latents}
```

## Licence

That of the images and of the VAE; look them up before you share or use these latents.
"""


def latents_card(info: LatentsInfo, *, repo_id: str) -> DatasetCard:
    """Makes the card of a folder of latents: content, usage, and metadata for the Hub and `datasets`.

    Args:
        info: Description of the folder.
        repo_id: The repository that the card is for, or a folder.
    """
    # Names and shapes.
    channels, size, _ = info.shape
    height, width = ('table["height"][0].as_py()', 'table["width"][0].as_py()') if info.latent_sizes else (size, size)
    repo_id = " ".join(repo_id.split())  # a line break would end the block of code
    name = repo_id.rstrip("/").split("/")[-1]
    bits = info.dtype == "bfloat16"

    # How to get latents from the stored values.
    lines = ["latents = values"]
    if info.kind == "moments":
        lines = ["mean, std = values.chunk(2, dim=1)", "latents = mean + std * torch.randn_like(std)"]
    formula = f"(latents - {info.shift_factor}) * {info.scaling_factor}"
    if info.latents_mean is not None:
        formula = f"(latents - latents_mean) * {info.scaling_factor} / latents_std"
        for field in ("latents_mean", "latents_std"):
            lines.append(f"{field} = torch.tensor({list(getattr(info, field))}).view(1, -1, 1, 1)")
    lines.append(
        f"latents = {formula}  # what a model is trained on, with table[{json.dumps([*info.captions, 'label'][0])}]"
    )

    # How to train on them.
    data_argument, conditions = shlex.quote(f"latents:{repo_id}"), f"classes | {len(info.id2label)}"
    training = f"train --data {data_argument} --preset XL/2 --output_dir runs/xl2"
    if info.captions:
        conditions = f"captions | {as_text(', '.join(info.captions))}{', encoded' if info.text else ''}"
        column = shlex.quote(info.captions[0])
        training = f"train-text --data {data_argument} --caption_column {column} ..."

    # Features of a vision encoder.
    features = ""
    if (stored := info.patch_features) is not None:
        size = stored.num_bytes(*(max(info.latent_sizes, key=math.prod) if info.latent_sizes else info.shape[1:]))
        features = (
            f"| features | column `features`{' and `features_flipped`' if info.has_flipped else ''}: {stored.width} "
            f"numbers for each {stored.patch_size}x{stored.patch_size} of the latents, row by row, {stored.dtype} as "
            f"bytes, {'at most ' if info.latent_sizes else ''}{size / 1024:.4g} KiB each, by "
            f"{as_text(stored.name_or_path)}, run in {as_text(stored.encoder_dtype)}, revision "
            f"{as_text(stored.revision or 'not known')} |\n"
        )

    # The whole card.
    text = _TEXT.format(
        features=features,
        title=as_text(name),
        repo_literal=json.dumps(repo_id),
        training=training,
        install=how_to_install(),
        conditions=conditions,
        num_samples=info.num_samples,
        pixels=", ".join(f"{height}x{width}" for height, width in info.sizes),
        rows=1 if info.latent_sizes else 4,
        crop=as_text(info.crop),
        source=as_text(", ".join(f"{key} {value}" for key, value in info.source.items() if value is not None)),
        flipped=", each also mirrored (`moments_flipped`)" if info.has_flipped else "",
        vae=as_text(info.vae["name_or_path"]),
        vae_class=as_text(info.vae["class_name"]),
        vae_dtype=as_text(info.vae["dtype"]),
        vae_revision=as_text(info.vae["revision"] or "not known"),
        formula=f"`{formula}`",
        content="mean and standard deviation of the posterior" if info.kind == "moments" else "latents",
        shape=f"{channels} x height x width" if info.latent_sizes else "x".join(map(str, info.shape)),
        sizes=f"{channels}, {height}, {width}",
        dtype=info.dtype,
        bits=", its bits stored as uint16" if bits else "",
        view=".view(torch.bfloat16)" if bits else "",
        latents="\n".join(lines),
        num_unreadable=len(info.unreadable),
    )
    data = DatasetCardData(
        license="other",
        pretty_name=name,
        tags=["diffusers-tread", "latents", "diffusion"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.arrow"}]}],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
