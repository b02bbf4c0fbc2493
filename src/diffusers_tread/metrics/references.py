# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What samples are compared with: `.npz` files of statistics or images, in the format of ADM's reference batches.

- mu, sigma: mean and covariance of the features; mu_s, sigma_s: of the spatial ones, for sFID.
- arr_0: images, uint8 [N, H, W, 3].
- count, extractor: number of samples and the network's fingerprint, only in files that `save_statistics` wrote.
"""

import logging
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import file_sha256, publish
from .feature_statistics import FeatureStatistics
from .networks import FeatureExtractor


logger = logging.getLogger(__name__)

_KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# Files without a fingerprint are taken for statistics of the 2015 Inception, as ADM's and clean-fid's are.
_INCEPTION = ("inception", "clean-fid:clean", "clean-fid:legacy_tensorflow")
_INCEPTION_SIZES = {"features": 2048, "spatial": 2023}


class NpzImages:
    """The images of an `.npz` file, read piece by piece.

    Args:
        path: With arr_0, uint8 [N, H, W, 3].

    Raises:
        ValueError: No such file or array, or another type or shape.
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
        # Opened once: going forward then does not read again what lies before.
        self._file = None

    def __len__(self) -> int:
        return self._length

    @cached_property
    def description(self) -> dict[str, Any]:
        """By which the same images are known again."""
        return {"kind": "file", "name": self.path.name, "num_images": len(self), "sha256": file_sha256(self.path)}

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The images from `start` up to, not including, `stop` as uint8 [stop - start, 3, H, W].

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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What `load_reference` found."""

    path: Path
    sha256: str
    """Of the file."""
    statistics: dict[str, FeatureStatistics]
    """By output of the extractor: "features", "spatial". Empty if the file holds images only."""
    images: NpzImages | None
    """What precision and recall need the features of."""


def save_statistics(path: str | Path, statistics: dict[str, FeatureStatistics]) -> None:
    """Writes statistics of one set of images to an `.npz` file, which is there whole or not at all.

    Args:
        path: The file.
        statistics: Of "features" and, where the extractor has them, "spatial".
    """
    path = Path(path)
    arrays = {}
    for output, values in statistics.items():
        mean, covariance = _KEYS[output]
        arrays |= {mean: values.mean.numpy(), covariance: values.covariance.numpy()}
    features = statistics["features"]
    known = {"count": features.count, "extractor": features.extractor}
    arrays |= {key: np.array(value) for key, value in known.items() if value is not None}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_reference(path: str | Path, *, extractor: FeatureExtractor) -> Reference:
    """Reads statistics, images or both from an `.npz` file.

    ADM's files do not say how their statistics were made. They are taken for Inception's, with a warning.

    Args:
        path: A file of `save_statistics`, of ADM or of clean-fid.
        extractor: What the samples' features will be made with.

    Raises:
        ValueError: No such file, neither statistics nor images, statistics of another extractor, pickled arrays.
    """
    path = Path(path)
    with _open_zip(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if not {"arr_0"} <= names and not {"mu", "sigma"} <= names:
        raise ValueError(
            f"Expected mu and sigma, or images as arr_0, in {path}, got {sorted(names)}. Use a file in ADM's format."
        )
    try:
        statistics = _read_statistics(path, names, extractor)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    return Reference(
        path=path,
        sha256=file_sha256(path),
        statistics=statistics,
        images=NpzImages(path) if "arr_0" in names else None,
    )


def _read_statistics(path: Path, names: set[str], extractor: FeatureExtractor) -> dict[str, FeatureStatistics]:
    statistics = {}
    with np.load(path, allow_pickle=False) as file:
        count = int(file["count"]) if "count" in names else None
        recorded = str(file["extractor"]) if "extractor" in names else None
        for output, (mean, covariance) in _KEYS.items():
            if output in extractor.outputs and {mean, covariance} <= names:
                statistics[output] = _statistics(file[mean], file[covariance], count, recorded)

    # Whose statistics they are.
    if recorded is not None and recorded != extractor.fingerprint:
        raise ValueError(
            f"Expected statistics made with {extractor.fingerprint}, got some made with {recorded}. Use that one, or "
            "make them again from the images."
        )
    for output, values in statistics.items() if recorded is None else ():
        if extractor.name not in _INCEPTION or values.num_features != _INCEPTION_SIZES[output]:
            raise ValueError(
                f"Expected statistics made with {extractor.fingerprint}, got {values.num_features} {output} of which "
                "the file does not say what made them. Use such files with an Inception extractor only."
            )
        logger.warning(f"{path} does not say what made its {output}. They are taken for those of {extractor.name}.")
    return statistics


def _statistics(
    mean: np.ndarray, covariance: np.ndarray, count: int | None, extractor: str | None
) -> FeatureStatistics:
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"Expected a mean [D] and a covariance [D, D], got {mean.shape} and {covariance.shape}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("Expected finite statistics, got others. Make them again.")
    return FeatureStatistics(
        mean=torch.from_numpy(mean), covariance=torch.from_numpy(covariance), count=count, extractor=extractor
    )


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected an .npz file at {path}, got {error}. Check the path or fetch it again.") from error


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of an open .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
