# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""An optimiser in one file: gradient descent with momentum."""

import torch

from diffusers_tread.runs.optimizers import register_optimizer


def make_sgd(config, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)


register_optimizer("sgd", make_sgd)
