# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A check for NaN and infinity."""

from collections.abc import Mapping

import torch


def check_finite(tensors: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Raises ValueError with the names of the tensors that hold NaN or infinity.

    Only floating-point and complex tensors are checked. `what` names the tensors in the message, in the plural.
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
    # float8 has no isfinite.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())
