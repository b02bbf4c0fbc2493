# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The Inception network of FID (TensorFlow's of 2015-12-05) through torch-fidelity and through clean-fid.

The networks and the two ways of resizing are the libraries' own. Their loading is not: torch-fidelity unpickles
whatever is in the file, clean-fid leaves half of a file behind when a download breaks.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from .features import FeatureExtractor, read_state_dict


# Of the files that the two libraries download, as published by projects that pin them.
SHA256 = {
    "weights-inception-2015-12-05-6726825d.pth": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "inception-2015-12-05.pt": "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
}


class InceptionExtractor(FeatureExtractor):
    """torch-fidelity's port, with TensorFlow 1's resizing.

    features: pool_3, 2,048 values. logits: 1,008 classes without bias, of which the Inception Score is computed.
    spatial: the first 7 channels of mixed_6/conv, 17 x 17 x 7 = 2,023 values with the channel last, as ADM's sFID
    takes them. That node is `Mixed_6d.branch1x1` in torch-fidelity's table of names; the values were not compared with
    TensorFlow's.

    Args:
        weights: A state dict instead of torch-fidelity's download.

    Raises:
        ImportError: torch-fidelity, or the torchvision it imports, is missing or broken.
        ValueError: No such weights.
    """

    def __init__(self, weights: Path | None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
            raise ImportError(
                f'Expected torch-fidelity and a torchvision made for torch {torch.__version__}, got "{error}". Do '
                '`pip install "diffusers-tread[fid]"`, or use "clean-fid:legacy_tensorflow" for FID, '
                "which needs no torchvision."
            ) from error
        weights = weights or _download(URL_INCEPTION_V3)
        with tempfile.TemporaryDirectory() as folder:
            # The class reads a file, and unpickles it: it gets one of tensors.
            copy = Path(folder) / "weights.pth"
            torch.save(read_state_dict(weights), copy)
            try:
                network = FeatureExtractorInceptionV3(
                    "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
                )
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"Expected weights of torch-fidelity's Inception in {weights}, got {error}"
                ) from error
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


class CleanFIDExtractor(FeatureExtractor):
    """clean-fid's TorchScript file of the same network: 2,048 values of pool_3.

    Args:
        mode: "clean" resizes with PIL's antialiased bicubic filter (arXiv 2104.11222), "legacy_tensorflow" as the
            original does.
        weights: inception-2015-12-05.pt instead of clean-fid's download.

    Raises:
        ImportError: clean-fid is missing.
        ValueError: An unknown mode; no such weights.
    """

    def __init__(self, mode: str, weights: Path | None):
        if mode not in ("clean", "legacy_tensorflow"):
            raise ValueError(f'Expected "clean" or "legacy_tensorflow" of clean-fid, got {mode!r}. Use one of them.')
        try:
            from cleanfid.downloads_helper import inception_url
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise ImportError(
                f'Expected clean-fid, got "{error}". Do `pip install "diffusers-tread[fid]"`.'
            ) from error
        weights = weights or _download(inception_url)
        if weights.name != Path(inception_url).name:  # the class takes a folder
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


def _download(url: str) -> Path:
    """A file in torch's cache, there whole or not at all.

    Raises:
        ValueError: It cannot be had, or is another than expected.
    """
    name = url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256.get(name))
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(
                f"Expected to download {url}, got {error}. Download it elsewhere and give the file as weights, or put "
                f"it at {path}."
            ) from error
    return path
