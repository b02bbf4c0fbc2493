# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Hash of a module's weights that does not depend on device or storage dtype."""

import hashlib

import torch


def weights_fingerprint(module: torch.nn.Module, *, rounded_to: torch.dtype = torch.float32) -> str:
    """A hash of the names, shapes and float32 values of a module's weights.

    Args:
        module: Any module.
        rounded_to: Precision that the values are rounded to first, so that a module loaded in this precision and one
            loaded in a higher precision give the same hash.

    Returns:
        64 hexadecimal digits, the same on every device and for every storage precision that float32 can represent.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().to(rounded_to).float().cpu().contiguous().numpy().reshape(-1))
    return digest.hexdigest()
