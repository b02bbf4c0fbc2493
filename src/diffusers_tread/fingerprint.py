# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Hash of a module's weights that does not depend on device or storage dtype."""

import hashlib

import torch


def weights_fingerprint(module: torch.nn.Module, *, dtype: torch.dtype = torch.float32) -> str:
    """A hash of the names, shapes and float32 values of a module's weights.

    Args:
        module: With the weights.
        dtype: What the values are rounded to before, so that modules in this precision and higher ones are the same.

    Returns:
        64 hexadecimal digits, the same on every device and for weights stored in any precision that float32 holds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().to(dtype).float().cpu().contiguous().numpy().reshape(-1))
    return digest.hexdigest()
