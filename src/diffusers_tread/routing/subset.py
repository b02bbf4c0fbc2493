# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which tokens are kept: a pure function of (seed, route, sample, position).

Nothing here holds state or draws a random number, so the subset is the same on every device, in the recomputation of
a checkpointed block and after a resume. The hashes are integers, and all products stay below 2**63, so none overflows.
Shapes: B batch, N tokens, K kept tokens.
"""

import torch


_MASK_32 = 0xFFFFFFFF


def subset_hashes(seed: torch.Tensor, *, route_index: int, batch_size: int, num_tokens: int) -> torch.Tensor:
    """One hash per token, uniform over [0, 2**32); independent between seeds, routes, samples and positions.

    Args:
        seed: int64 tensor, [] for the whole batch (the sample's index in the batch then enters the hash) or [B], one
            per sample (the index does not enter, so a sample's subset is the same in every batch).
        route_index: Which route of the model.
        batch_size: B.
        num_tokens: N, below 2**30.

    Returns:
        [B, N] int64.
    """
    state = _sample_hashes(seed, route_index, batch_size)  # B
    positions = torch.arange(num_tokens, device=seed.device)  # N
    return _mix(state.unsqueeze(1) ^ _mix(positions + 1))  # B N


def choose_samples(seed: torch.Tensor, *, route_index: int, batch_size: int, share: float) -> torch.Tensor:
    """Chooses each sample of a batch with probability `share`, independently of the tokens that are kept.

    Args:
        seed: As in `subset_hashes`.
        route_index: Which route of the model.
        batch_size: B.
        share: In [0, 1].

    Returns:
        [B] bool.
    """
    return _mix(_sample_hashes(seed, route_index, batch_size)) < round(share * 2**32)


def select_kept_tokens(priority: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Ids of the `num_kept` tokens of highest priority, sorted ascending.

    Args:
        priority: [B, N], int64 or float. The caller must exclude ties between int64 priorities.
        num_kept: K, 1 <= K <= N.

    Returns:
        [B, K] int64.
    """
    return priority.topk(num_kept, dim=1, sorted=False).indices.sort(dim=1).values


def random_priority(hashes: torch.Tensor, *, force_keep: torch.Tensor | None = None) -> torch.Tensor:
    """Priorities that make all subsets of one size equally likely: the hash, with ties broken by the position.

    Args:
        hashes: [B, N] int64 in [0, 2**32), from `subset_hashes`.
        force_keep: [B, N] or [N] bool, tokens that rank above all others.

    Returns:
        [B, N] int64.
    """
    positions = torch.arange(hashes.shape[1], device=hashes.device)
    priority = (hashes << 30) | positions  # B N, below 2**62
    return priority if force_keep is None else priority + (force_keep.to(torch.int64) << 62)


def magnitude_priority(
    hashes: torch.Tensor,
    hidden_states: torch.Tensor,
    *,
    magnitude_mix: float,
    force_keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1 - l) * rand + l * m, with m the L1 norm of each token scaled to [0, 1] within its sample (TREAD v1).

    Args:
        hashes: [B, N] int64, from `subset_hashes`.
        hidden_states: [B, N, D], the tokens whose magnitude counts. No gradient flows through the choice.
        magnitude_mix: l in [-1, 1]. Positive keeps large tokens; negative keeps small ones, as v1's code does unless
            its `inverse` is set.
        force_keep: As in `random_priority`.

    Returns:
        [B, N] float32: scores in bf16 would tie.
    """
    norm = hidden_states.detach().float().abs().sum(dim=2)  # B N
    smallest, largest = norm.aminmax(dim=1, keepdim=True)
    magnitude = (norm - smallest) / (largest - smallest).clamp_min(torch.finfo(torch.float32).tiny)
    if magnitude_mix < 0:
        magnitude = 1.0 - magnitude

    uniform = (hashes >> 8).float() * 2.0**-24  # B N, exact
    priority = (1.0 - abs(magnitude_mix)) * uniform + abs(magnitude_mix) * magnitude
    return priority if force_keep is None else priority + 2.0 * force_keep


def _sample_hashes(seed: torch.Tensor, route_index: int, batch_size: int) -> torch.Tensor:
    """[B] int64 in [0, 2**32)."""
    rows = torch.arange(batch_size, device=seed.device) if seed.dim() == 0 else torch.zeros_like(seed)  # B
    state = _mix(seed & _MASK_32)
    state = _mix(state ^ ((seed >> 32) & _MASK_32))
    state = _mix(state ^ route_index)
    return _mix(state ^ rows)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers with low bias (constants: hash-prospector, public domain)."""
    state = ((state ^ (state >> 16)) * 0x21F0AAAD) & _MASK_32
    state = ((state ^ (state >> 15)) * 0x735A2D97) & _MASK_32
    return state ^ (state >> 15)
