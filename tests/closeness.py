# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How near two results of the same arithmetic must lie, from the arithmetic and not from what one processor gave.

Processors add in different orders, with and without fused products. A result of n roundings in a row, each up or down
by at most eps / 2, is off by about eps / 4 * sqrt(n) of its size: the sum of the lengths of the sums that follow each
other is such an n. Norms are compared, because single elements are as small as chance makes them, their errors not.
"""

import torch


def rounding(n, dtype=torch.float32):
    """The largest difference of norms that `n` roundings in a row explain, with a factor of sixteen to spare."""
    return 4 * torch.finfo(dtype).eps * n**0.5


def difference(found, expected):
    """||found - expected|| / ||expected||, of lists of tensors over all of them together."""
    found, expected = (
        [tensor.detach().double().cpu() for tensor in (tensors if isinstance(tensors, list) else [tensors])]
        for tensors in (found, expected)
    )
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    found, expected = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def assert_same_gradients(found, expected, limit):
    """Asserts that each gradient of a dictionary differs by at most `limit` of its norm.

    Where terms cancel, as in the bias of an attention's keys, their rounding is left: no norm counts for less than a
    hundredth of the largest.
    """
    assert found.keys() == expected.keys() and found
    least = 0.01 * max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape, name
        error = (found[name] - gradient).norm().item() / max(gradient.norm().item(), least)
        assert error <= limit, f"{name}: {error:.1e} of the norm {gradient.norm():.1e}, allowed {limit:.1e}"
