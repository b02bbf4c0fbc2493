# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The stand-in for rotary tables without a batch axis, against a loop over the samples."""

import pytest
import torch

from diffusers_tread.hooks.per_sample_table import PerSampleTable


ROWS = torch.randn(3, 5, 4)  # B K D


@pytest.mark.parametrize(
    "use",
    [
        lambda table, x: x * table[None, :, None, :],
        lambda table, x: x * table[None, :, None],
        lambda table, x: x * table.unsqueeze(0).unsqueeze(2),
        lambda table, x: x * table.unsqueeze(1),
        lambda table, x: table.unsqueeze(-2) * x,
        lambda table, x: x * table.view(1, table.shape[0], 1, table.size(-1)),
        lambda table, x: x * table[:, None, :].to(torch.float32),
        lambda table, x: x[..., :2] * table.float()[..., 0::2][None, :, None, :],
        lambda table, x: x[..., :2] * table.chunk(2, dim=-1)[1][None, :, None, :],
        lambda table, x: x * table[-5:].cos()[:, None] + x * table.sin()[None, :, None],
    ],
)
def test_rotary_code_sees_each_samples_own_rows(use):
    x = torch.randn(3, 5, 2, 4)  # B K heads D
    expected = torch.cat([use(ROWS[i], x[i : i + 1]) for i in range(3)])
    assert torch.equal(use(PerSampleTable(ROWS), x), expected)


def test_it_has_the_shape_of_one_table():
    table = PerSampleTable(ROWS)
    assert table.shape == (5, 4) and table.ndim == table.dim() == 2 and len(table) == table.size(0) == 5


@pytest.mark.parametrize(
    "use", [lambda table: torch.randn(5, 4) * table, lambda table: table * 2.0, lambda table: table.view(5, 2, 2)]
)
def test_what_would_pair_samples_with_tokens_is_an_error(use):
    with pytest.raises(TypeError):
        use(PerSampleTable(ROWS))
