# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Numbers that are numbers."""

from collections.abc import Mapping

import torch


def check_finite(tensors: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Raises ValueError for tensors with NaN or infinity, by name; `what` says what they are, in the plural.

    Only floating-point and complex tensors are looked at.
    """
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"Expected finite {what}, got NaN or infinity in {wrong[:10]}{more}. Use an earlier checkpoint, or one "
            "whose training did not diverge."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return True
    # float8 knows no isfinite.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())
