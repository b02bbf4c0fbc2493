# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a routed transformer on handwritten digits in a loop of its own, then samples it. To be copied and changed.

docs/own-loop.md says why each line is there.
"""

from diffusers_tread.installation import require


require("train", "sklearn")

import torch
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from tqdm.auto import trange

from diffusers_tread import (
    FlowMatchingObjective,
    RoutingCall,
    SparseGuidance,
    TREADPipeline,
    TREADTransformer2DModel,
)
from diffusers_tread.pictures import make_grid


def train(folder: str, *, num_steps: int = 500, batch_size: int = 32, seed: int = 0) -> None:
    torch.manual_seed(seed)
    digits = load_digits()
    latents, labels = torch.tensor(digits.images[:, None] / 8 - 1).float(), torch.tensor(digits.target)  # B 1 8 8, B

    size = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 8, "patch_size": 2}
    data = {"in_channels": 1, "sample_size": 8, "num_classes": 10, "objective": "flow"}
    model = TREADTransformer2DModel(**size, **data).train()  # its blocks 2 to 4 see half of the tokens
    objective, ema = FlowMatchingObjective(), EMAModel(model.parameters(), decay=0.99)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=num_steps, pct_start=0.05)

    for step in trange(num_steps, desc="Steps"):
        batch = torch.randint(len(latents), (batch_size,))
        given = labels[batch].masked_fill(torch.rand(batch_size) < 0.1, 10)  # 10 is the null class
        routing = RoutingCall(enabled=step < 0.85 * num_steps)  # the last steps are dense, as sampling is
        objective.loss(model, latents[batch], class_labels=given, routing=routing).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    ema.copy_to(model.parameters())
    TREADPipeline(model.eval(), objective.scheduler()).save_pretrained(folder)


def main(folder: str = "outputs/own-loop") -> None:
    train(folder)
    pipeline = TREADPipeline.from_pretrained(folder)
    pipeline.guider = SparseGuidance(guidance_scale=1.5)  # or None, and guidance_scale=1.5 in the call: CFG
    images = pipeline(list(range(10)) * 4, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
    make_grid(images, columns=10).save(f"{folder}/samples.png")


if __name__ == "__main__":
    main()
