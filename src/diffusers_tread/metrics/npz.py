# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""References as `.npz` files of statistics, images or both, in the format of ADM's reference batches.

- mu, sigma: mean and covariance of the features; mu_s, sigma_s: those of the spatial features, for sFID. For any other
  output, the suffix is its name.
- arr_0: images, uint8 [N, H, W, 3].
- count, extractor: number of samples and fingerprint of the network, only in files written by `save_statistics`.
"""

import logging
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..field_docs import with_field_docs
from ..files import file_sha256, whole
from .feature_statistics import FeatureStatistics
from .networks import FeatureExtractor


logger = logging.getLogger(__name__)

# ADM's suffixes.
_SUFFIXES = {"features": "", "spatial": "_s"}
# Statistics without a fingerprint, such as ADM's and clean-fid's, are assumed to be of the 2015 Inception.
_INCEPTION = ("inception", "clean-fid:clean", "clean-fid:legacy_tensorflow")
_INCEPTION_SIZES = {"features": 2048, "spatial": 2023}


class NpzImages:
    """The images of an `.npz` file, read in parts.

    Args:
        path: File with arr_0, uint8 [N, H, W, 3].

    Raises:
        ValueError: The file or the array is missing, or the array has another type or shape.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _open_zip(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"Expected images as arr_0 in {path}, got {archive.namelist()}. Use np.savez.")
            with archive.open("arr_0.npy") as file:
                shape, fortran_order, dtype = _read_header(file)
                self._offset = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            raise ValueError(
                f"Expected arr_0 of {path} as uint8 [N, H, W, 3] in C order, got {dtype} {shape}. Convert the images."
            )
        self._length, self.height, self.width, _ = shape
        # Kept open, so that reading forward in the compressed file does not start from its beginning each time.
        self._file = None

    def __len__(self) -> int:
        return self._length

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the images by the file's hash."""
        return self._description

    @cached_property  # separate, because type checkers do not accept it as the protocol's property
    def _description(self) -> dict[str, Any]:
        return {"kind": "file", "name": self.path.name, "num_images": len(self), "sha256": file_sha256(self.path)}

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the images start .. stop - 1 as [B, 3, H, W] uint8.

        Raises:
            ValueError: The file is cut off.
        """
        stop = min(stop, len(self))
        size = self.height * self.width * 3
        if self._file is None:
            self._file = _open_zip(self.path).open("arr_0.npy")
        self._file.seek(self._offset + start * size)
        data = self._file.read((stop - start) * size)
        if len(data) != (stop - start) * size:
            raise ValueError(f"Expected {len(self)} images in {self.path}, got a file cut off. Fetch it again.")
        pixels = np.frombuffer(data, dtype=np.uint8).reshape(-1, self.height, self.width, 3)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class NpzReference:
    """The content of a reference file."""

    path: Path
    sha256: str
    """Hash of the file."""
    statistics: dict[str, FeatureStatistics]
    """Statistics by output of the extractor; empty if the file holds images only."""
    images: NpzImages | None
    """Images; None if the file holds statistics only."""


def save_statistics(path: str | Path, statistics: dict[str, FeatureStatistics]) -> None:
    """Writes statistics of one set of images to an `.npz` file, atomically.

    Args:
        path: The file.
        statistics: Statistics by output of one extractor, such as "features"; at least one.
    """
    path = Path(path)
    arrays = {}
    for output, values in statistics.items():
        mean, covariance = _keys(output)
        arrays |= {mean: values.mean.numpy(), covariance: values.covariance.numpy()}
    first = next(iter(statistics.values()))  # the others are of the same images and network
    known = {"count": first.count, "extractor": first.extractor}
    arrays |= {key: np.array(value) for key, value in known.items() if value is not None}

    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_reference(path: str | Path, *, extractor: FeatureExtractor) -> NpzReference:
    """Reads statistics, images or both from an `.npz` file.

    ADM's files do not say which network made their statistics. They are assumed to be Inception's, with a warning.

    Args:
        path: A file of `save_statistics`, of ADM or of clean-fid.
        extractor: The network that will extract the samples' features.

    Raises:
        ValueError: The file does not exist; it holds neither statistics nor images; it holds statistics of another
            extractor; or it holds pickled arrays.
    """
    path = Path(path)
    with _open_zip(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    try:
        statistics = _read_statistics(path, names, extractor)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    images = NpzImages(path) if "arr_0" in names else None
    if not statistics and images is None:
        raise ValueError(
            f"Expected mu and sigma, or images as arr_0, in {path}, got {sorted(names)}. Use a file in ADM's format."
        )
    return NpzReference(path=path, sha256=file_sha256(path), statistics=statistics, images=images)


def _keys(output: str) -> tuple[str, str]:
    """Names of mean and covariance in a file."""
    suffix = _SUFFIXES.get(output, f"_{output}")
    return f"mu{suffix}", f"sigma{suffix}"


def _read_statistics(path: Path, names: set[str], extractor: FeatureExtractor) -> dict[str, FeatureStatistics]:
    """Reads the statistics of the extractor's outputs and checks that this extractor made them."""
    # Read.
    statistics = {}
    with np.load(path, allow_pickle=False) as file:
        count = _count(file["count"]) if "count" in names else None
        recorded = str(file["extractor"]) if "extractor" in names else None
        for output in extractor.outputs:
            mean, covariance = _keys(output)
            if {mean, covariance} <= names:
                statistics[output] = _statistics(file[mean], file[covariance], count, recorded)

    # The network is the one in the file; without an entry, the statistics must look like Inception's.
    if recorded is not None and recorded != extractor.fingerprint:
        raise ValueError(
            f"Expected statistics made with {extractor.fingerprint}, got some made with {recorded}. Use that one, or "
            "make them again from the images."
        )
    for output, values in statistics.items() if recorded is None else ():
        if extractor.name not in _INCEPTION or values.num_features != _INCEPTION_SIZES.get(output):
            raise ValueError(
                f"Expected statistics made with {extractor.fingerprint}, got {values.num_features} {output} of which "
                "the file does not say what made them. Use such files with an Inception extractor only."
            )
        logger.warning(f"{path} does not say what made its {output}. They are taken for those of {extractor.name}.")
    return statistics


def _statistics(
    mean: np.ndarray, covariance: np.ndarray, count: int | None, extractor: str | None
) -> FeatureStatistics:
    for name, array in {"mean": mean, "covariance": covariance}.items():
        if array.dtype.kind != "f":
            raise ValueError(f"Expected a {name} in floating point, got {array.dtype}. Make the statistics again.")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"Expected a mean [D] and a covariance [D, D], got {mean.shape} and {covariance.shape}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("Expected finite statistics, got NaN or infinity. Make them again.")
    variances = covariance.diagonal()
    if variances.min() < 0 or not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * variances.max()):
        raise ValueError(
            "Expected a covariance, got a matrix that is not symmetric or has negative variances. Make it again."
        )
    return FeatureStatistics(
        mean=torch.from_numpy(mean), covariance=torch.from_numpy(covariance), count=count, extractor=extractor
    )


def _count(array: np.ndarray) -> int:
    if array.ndim or array.dtype.kind not in "iu" or array < 1:
        raise ValueError(f"Expected the count as an integer of at least 1, got {array.dtype} {array.tolist()!r:.40}.")
    return int(array)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected an .npz file at {path}, got {error}. Check the path or fetch it again.") from error


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, Fortran order and type of an open .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
