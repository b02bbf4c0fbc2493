# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Taking the kept tokens out of the sequence and putting them back.

Shapes: B batch, N tokens, K kept tokens, D width. Flat `index_select` and `index_copy` over [B * N, D] are several
times faster than `gather` and `scatter` with an index expanded over D, forward and backward.
"""

import numpy as np
import torch


def take_tokens(hidden_states: torch.Tensor, kept_token_ids: torch.Tensor) -> torch.Tensor:
    """The kept tokens of each sample.

    Args:
        hidden_states: [B, N, ...].
        kept_token_ids: [B, K] int64, per sample, each id in [0, N) at most once.

    Returns:
        [B, K, ...], a copy.
    """
    batch_size, num_tokens = hidden_states.shape[:2]
    flat_ids = _flat_token_ids(kept_token_ids, num_tokens)  # B*K
    kept = hidden_states.flatten(0, 1).index_select(0, flat_ids)  # B*K ...
    return kept.unflatten(0, (batch_size, kept_token_ids.shape[1]))  # B K ...


def put_tokens(
    hidden_states: torch.Tensor, kept_token_ids: torch.Tensor, kept_hidden_states: torch.Tensor
) -> torch.Tensor:
    """The full sequence with the kept tokens replaced; all others are copied bit for bit.

    Args:
        hidden_states: [B, N, ...], the states that routed tokens return with: the sequence before the route, or
            another one, see `TokenRoute.rejoin`. Not modified.
        kept_token_ids: [B, K] int64, as given to `take_tokens`.
        kept_hidden_states: [B, K, ...], the kept tokens after the routed blocks; cast to the dtype of `hidden_states`
            (under autocast a block may return another dtype than it was given).

    Returns:
        [B, N, ...], a new tensor.
    """
    flat_ids = _flat_token_ids(kept_token_ids, hidden_states.shape[1])  # B*K
    kept = kept_hidden_states.flatten(0, 1).to(hidden_states.dtype)  # B*K ...
    return hidden_states.flatten(0, 1).index_copy(0, flat_ids, kept).unflatten(0, hidden_states.shape[:2])


def _flat_token_ids(kept_token_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    first_rows = torch.arange(kept_token_ids.shape[0], device=kept_token_ids.device).unsqueeze(1) * num_tokens  # B 1
    return (kept_token_ids + first_rows).flatten()  # B*K


def out_of_range(ids: torch.Tensor, limit: int) -> list[int]:
    """The ids outside [0, limit), sorted, each once; none where reading them would wait for a device.

    numpy reads them, not torch: what watches torch's operators for reads of the device sees none.
    """
    if type(ids) is not torch.Tensor or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return []
    values = ids.numpy()
    return np.unique(values[(values < 0) | (values >= limit)]).tolist()
