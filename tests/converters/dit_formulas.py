# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""DiT written from its paper (arXiv 2212.09748), as functions of a dictionary with DiT's names; nothing of ours.

With the weights of a LightningDiT (arXiv 2501.01423), whose names say which of its options it has, these as well.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


def random_dit(*, width=32, depth=6, channels=3, out_channels=3, patch=2, grid=4, classes=5, mlp_ratio=4, seed=0):
    """float32 weights that make every part count, and the fixed positions of a grid x grid model."""
    shapes = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch * patch * out_channels, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (mlp_ratio * width, width),
            f"blocks.{i}.mlp.fc2": (width, mlp_ratio * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    generator = torch.Generator().manual_seed(seed)
    weights = {"pos_embed": torch.from_numpy(positions(width, grid)).float()[None]}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    weights["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=generator)
    return weights


def as_lightningdit(weights, *, heads, grid=4, hidden=85, qk_norm=True, seed=5):
    """The weights of a DiT with RMSNorm, SwiGLU, rotary positions and, if asked for, normalised queries and keys."""
    width, generator = weights["x_embedder.proj.bias"].numel(), torch.Generator().manual_seed(seed)

    def random(*shape, std=0.1, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    lightning = {name: tensor for name, tensor in weights.items() if ".mlp.fc" not in name}
    for i in range(sum(name.endswith("attn.qkv.weight") for name in weights)):
        lightning[f"blocks.{i}.mlp.w12.weight"] = random(2 * hidden, width, std=width**-0.5)
        lightning[f"blocks.{i}.mlp.w12.bias"] = random(2 * hidden)
        lightning[f"blocks.{i}.mlp.w3.weight"] = random(width, hidden, std=hidden**-0.5)
        lightning[f"blocks.{i}.mlp.w3.bias"] = random(width)
        for name in ("norm1", "norm2"):
            lightning[f"blocks.{i}.{name}.weight"] = random(width, mean=1.0)
        for name in ("q_norm", "k_norm") if qk_norm else ():
            lightning[f"blocks.{i}.attn.{name}.weight"] = random(width // heads, mean=1.0)
    lightning["final_layer.norm_final.weight"] = random(width, mean=1.0)

    # Each angle twice in a row, for the channels 2 i and 2 i + 1; the first half of a head for the row.
    quarter = width // heads // 4
    angles = [
        [place / 10000 ** (k / quarter) for place in (row, column) for k in range(quarter) for _ in range(2)]
        for row in range(grid)
        for column in range(grid)
    ]
    angles = torch.tensor(angles, dtype=torch.float64)
    return lightning | {"feat_rope.freqs_cos": angles.cos().float(), "feat_rope.freqs_sin": angles.sin().float()}


def positions(width, grid):
    """[grid * grid, width]: the column's sines and cosines, then the row's (arXiv 2111.06377)."""
    table = np.empty((grid, grid, width))
    for row in range(grid):
        for column in range(grid):
            angles = [[place / 10000 ** (k / (width // 4)) for k in range(width // 4)] for place in (column, row)]
            table[row, column] = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
    return table.reshape(grid * grid, width)


def dit(weights, x, t, labels, *, heads):
    """The network's output [B, out_channels, H, W] in float64; `t` [B] is embedded as it is."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, t = x.double(), t.double()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(x, name):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] if f"{name}.weight" in w else x

    def normalised(x, shift, scale, name):
        x = rms(x, name) if f"{name}.weight" in w else rms(x - x.mean(-1, keepdim=True), name)
        return x * (1 + scale[:, None]) + shift[:, None]

    def rotated(x):
        if "feat_rope.freqs_cos" not in w:
            return x
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * w["feat_rope.freqs_cos"] + other * w["feat_rope.freqs_sin"]

    def feed_forward(x, name):
        if f"{name}.w12.weight" in w:
            gate, value = linear(x, f"{name}.w12").chunk(2, -1)
            return linear(F.silu(gate) * value, f"{name}.w3")
        x = linear(x, f"{name}.fc1")
        return linear(0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), f"{name}.fc2")

    def attention(x, name):
        batch, tokens, width = x.shape
        q, k, v = linear(x, f"{name}.qkv").reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if f"{name}.q_norm.weight" in w:
            q, k = rms(q, f"{name}.q_norm"), rms(k, f"{name}.k_norm")
        q, k = rotated(q), rotated(k)
        weight = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, dim=-1)
        return linear((weight @ v).transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    # Patches with positions.
    kernel = w["x_embedder.proj.weight"]
    patch, (batch, _, height, _) = kernel.shape[-1], x.shape
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # B N C*P*P
    tokens = patches @ kernel.flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]

    # Time and class.
    angles = t[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    time = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = F.silu(time + w["y_embedder.embedding_table.weight"][labels])

    # Blocks with adaLN-Zero.
    for i in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(condition, f"{block}.adaLN_modulation.1").chunk(6, 1)
        attended = attention(normalised(tokens, shift1, scale1, f"{block}.norm1"), f"{block}.attn")
        tokens = tokens + gate1[:, None] * attended
        forwarded = feed_forward(normalised(tokens, shift2, scale2, f"{block}.norm2"), f"{block}.mlp")
        tokens = tokens + gate2[:, None] * forwarded

    # Pixels: rows and columns of a patch, then channels.
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").chunk(2, 1)
    pixels = linear(normalised(tokens, shift, scale, "final_layer.norm_final"), "final_layer.linear")
    grid = height // patch
    image = pixels.reshape(batch, grid, grid, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", image).reshape(batch, -1, height, height)
