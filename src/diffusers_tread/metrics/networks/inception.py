# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""TensorFlow's Inception network of 2015-12-05 in torch-fidelity's port: the network of FID, sFID and Inception Score.

Network and resizing are torch-fidelity's own code. The weights are loaded here, because torch-fidelity unpickles
anything in the file. Only the module of the network is imported, because torch-fidelity itself imports torchvision,
which is not needed for it.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ...installation import FID_NETWORKS
from .feature_extractor import FeatureExtractor
from .weights import download_weights, read_state_dict


PACKAGE = "torch_fidelity"


class InceptionExtractor(FeatureExtractor):
    """torch-fidelity's Inception, with TensorFlow 1's resizing.

    Outputs:
        features: pool_3, 2,048 values.
        logits: 1,008 logits without bias, for the Inception Score.
        spatial: The first 7 channels of mixed_6/conv, 17 x 17 x 7 = 2,023 values with the channel last, as in ADM's
            sFID. In torch-fidelity's table of names this node is `Mixed_6d.branch1x1`; the values were not compared
            with TensorFlow's.

    Args:
        weights: File with a state dict; None for torch-fidelity's download.

    Raises:
        ImportError: torch-fidelity is missing.
        ValueError: The weights are missing or are for another network.
    """

    def __init__(self, weights: Path | None = None):
        module = _import_network()
        weights = weights or download_weights(module.URL_INCEPTION_V3)
        network = _load_network(module.FeatureExtractorInceptionV3, weights)
        super().__init__(network, name="inception", outputs=("features", "spatial", "logits"), settings={})

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        spatial = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, args, output: spatial.append(output)
        )
        try:
            features, logits = self.network(images)
        finally:
            hook.remove()
        spatial = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1)  # B 17*17*7
        return {"features": features, "spatial": spatial, "logits": logits}


def _import_network() -> ModuleType:
    """Imports torch-fidelity's module of the network without its `__init__`. Raises ImportError if it is missing."""
    try:
        if PACKAGE in sys.modules:
            return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
        with _without_init(PACKAGE):
            return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ImportError(f'Expected torch-fidelity, got "{error}". Do `{FID_NETWORKS}`.') from error


@contextmanager
def _without_init(name: str) -> Iterator[None]:
    """Replaces a package that is not imported yet by an empty one with the same modules; at the end removes it."""
    if (spec := find_spec(name)) is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    try:
        yield
    finally:
        for module in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[module]


def _load_network(network_class: type[nn.Module], weights: Path) -> nn.Module:
    """Builds torch-fidelity's network. Its class unpickles its file, so it gets a file with only the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(read_state_dict(weights), copy)
        try:
            return network_class("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"Expected weights of torch-fidelity's Inception in {weights}, got {error}") from error
