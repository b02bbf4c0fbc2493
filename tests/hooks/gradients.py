# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The gradients of models, to compare."""

import torch


def gradients_of(model):
    """Copies by the names of the parameters, which wrappers around blocks do not change."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(first, second, *, rtol=1e-5, atol=1e-7):
    assert first.keys() == second.keys() and first
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=atol)
