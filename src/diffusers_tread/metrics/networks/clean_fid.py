# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The Inception network of FID from clean-fid.

Network and resizing are clean-fid's own code. The download is not, because clean-fid leaves half a file if a download
is interrupted.
"""

from pathlib import Path

import numpy as np
import torch

from ...installation import FID_NETWORKS
from .feature_extractor import FeatureExtractor
from .weights import download_weights


class CleanFIDExtractor(FeatureExtractor):
    """clean-fid's TorchScript file of TensorFlow's Inception: the 2,048 values of pool_3.

    Args:
        mode: "clean" resizes with PIL's antialiased bicubic filter (arXiv 2104.11222), "legacy_tensorflow" like
            TensorFlow 1.
        weights: The file inception-2015-12-05.pt; None for clean-fid's download.

    Raises:
        ImportError: clean-fid is missing.
        ValueError: The mode is unknown; the weights are missing or are for another network.
    """

    def __init__(self, mode: str, weights: Path | None = None):
        if mode not in ("clean", "legacy_tensorflow"):
            raise ValueError(f'Expected "clean" or "legacy_tensorflow" of clean-fid, got {mode!r}. Use one of them.')
        try:
            from cleanfid.downloads_helper import inception_url
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise ImportError(f'Expected clean-fid, got "{error}". Do `{FID_NETWORKS}`.') from error

        # The class takes a folder, and a fixed file name in it.
        weights = weights or download_weights(inception_url)
        if weights.name != Path(inception_url).name:
            raise ValueError(f"Expected a file named {Path(inception_url).name}, got {weights}. Rename it.")
        try:
            network = InceptionV3W(str(weights.parent), download=False, resize_inside=mode == "legacy_tensorflow")
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"Expected clean-fid's TorchScript network in {weights}, got {error}") from error
        self.resize = build_resizer(mode)
        super().__init__(network, name=f"clean-fid:{mode}", outputs=("features",), settings={"mode": mode})

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = [self.resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]  # each H W 3
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        return {"features": self.network(batch.to(self.device))}
