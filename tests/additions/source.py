# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A source of data in one file: squares of one colour each, made as they are asked for; the name is how many."""

import torch

from diffusers_tread.data import TrainingSource, register_source


class Squares(TrainingSource):
    name, vae, id2label = "squares", None, {0: "dark", 1: "light"}
    num_classes, resolution, channels, latent_size = 2, 8, 3, 8

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def batches(self, *, batch_size, seed, rank, num_ranks, samples_seen, **options):
        while True:
            first = samples_seen + rank * batch_size
            labels = torch.arange(first, first + batch_size) % 2
            shades = torch.rand(batch_size, generator=torch.Generator().manual_seed(seed + first)) + labels - 1
            yield {"shades": shades, "class_labels": labels, "corrupt": []}
            samples_seen += num_ranks * batch_size

    def to_latents(self, batch, *, device, generator):
        return batch["shades"].to(device)[:, None, None, None].expand(-1, 3, 8, 8)


register_source("toy", lambda name, **options: Squares(int(name)))
