# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The gradients of models, to compare."""

from closeness import assert_same_gradients, rounding


# There and back through 8 tiny blocks of width 16, with 64 in the MLP and about 20 tokens.
LIMIT = rounding(2 * 8 * 160)


def gradients_of(model):
    """Copies by the names of the parameters, which wrappers around blocks do not change."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(found, expected, limit=LIMIT):
    assert_same_gradients(found, expected, limit)
