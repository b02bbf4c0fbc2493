# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The card of a folder of latents, its README.md on the Hub."""

import json
import shlex

from huggingface_hub import DatasetCard, DatasetCardData

from ...markdown import as_text
from .info import LatentsInfo


_TEXT = """\
# {title}

{num_samples:,} images at {resolution}x{resolution} pixels ({crop} crop), encoded by {vae}{flipped}, for training \
latent diffusion models with diffusers-tread.

| | |
|---|---|
| images | {source} |
| classes | {num_classes} |
| VAE | {vae}, {vae_class}, run in {vae_dtype}, revision {vae_revision} |
| a record | {content}, {shape}, {dtype}{bits} |
| training uses | {formula} |
| left out as unreadable | {num_unreadable} |

`latents.json` holds all of this and the SHA-256 of every shard.

## Use

```bash
python examples/train_tread.py --data {data_argument} --preset XL/2 --output_dir runs/xl2
```

With `datasets` alone:

```python
import torch
from datasets import load_dataset

records = load_dataset({repo_literal}, split="train").with_format("arrow")
table = records[:4]
values = torch.tensor(table["moments"].combine_chunks().flatten().to_numpy()){view}
values = values.view(-1, {sizes}).float()
{latents}
```

## Licence

That of the images and of the VAE; look them up before you share or use these latents.
"""


def latents_card(info: LatentsInfo, *, repo_id: str) -> DatasetCard:
    """Writes down what a folder of latents is and how to use it, with the metadata that the Hub and `datasets` read.

    Args:
        info: Of the folder.
        repo_id: The repository it is for, or a folder.
    """
    channels, size, _ = info.shape
    name = repo_id.rstrip("/").split("/")[-1]
    bits = info.dtype == "bfloat16"
    lines = ["latents = values"]
    if info.kind == "moments":
        lines = ["mean, std = values.chunk(2, dim=1)", "latents = mean + std * torch.randn_like(std)"]
    formula = f"(latents - {info.shift_factor}) * {info.scaling_factor}"
    if info.latents_mean is not None:
        formula = f"(latents - latents_mean) * {info.scaling_factor} / latents_std"
        for field in ("latents_mean", "latents_std"):
            lines.append(f"{field} = torch.tensor({list(getattr(info, field))}).view(1, -1, 1, 1)")
    lines.append(f'latents = {formula}  # what a model is trained on, with table["label"]')
    text = _TEXT.format(
        title=as_text(name),
        repo_literal=json.dumps(repo_id),
        data_argument=shlex.quote(f"latents:{repo_id}"),
        num_samples=info.num_samples,
        resolution=info.resolution,
        crop=as_text(info.crop),
        source=as_text(", ".join(f"{key} {value}" for key, value in info.source.items() if value is not None)),
        num_classes=len(info.id2label),
        flipped=", each also mirrored (`moments_flipped`)" if info.has_flipped else "",
        vae=as_text(info.vae["name_or_path"]),
        vae_class=as_text(info.vae["class_name"]),
        vae_dtype=as_text(info.vae["dtype"]),
        vae_revision=as_text(info.vae["revision"] or "not known"),
        formula=f"`{formula}`",
        content="mean and standard deviation of the posterior" if info.kind == "moments" else "latents",
        shape="x".join(map(str, info.shape)),
        sizes=f"{channels}, {size}, {size}",
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
