# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Opens and checks the reference that samples are compared with, and extracts its features if it has images."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..field_docs import with_field_docs
from .extraction import describe_images, extract_features
from .feature_statistics import FeatureStatistics
from .feature_store import FeatureStore
from .image_sources import FolderImages, ImageSource
from .networks import FeatureExtractor
from .npz import load_reference
from .registry import METRICS, check_metrics, possible_metrics


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class PreparedReference:
    """The reference that samples are compared with."""

    description: dict[str, Any]
    """Name, hash and, if known, the number of images."""
    metrics: tuple[str, ...]
    """Metrics that can be computed with it."""
    statistics: dict[str, FeatureStatistics]
    """Statistics by output of the extractor; those computed from images are only in the main process."""
    store: FeatureStore | None
    """Features of the images; None if no metric needs them."""


def prepare_reference(
    reference: str | Path | ImageSource,
    *,
    extractor: FeatureExtractor,
    batch_size: int,
    store_dir: str | Path,
    metrics: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> PreparedReference:
    """Opens and checks a reference, and extracts its features if a metric needs them; all processes call it together.

    Args:
        reference: An `.npz` file with statistics or images, a folder of images, or any `ImageSource`.
        extractor: The network whose features are compared.
        batch_size: Images per forward pass of the extractor.
        store_dir: Folder, shared by all processes, in which each reference gets a folder for its features.
        metrics: Metrics to compute; None for all that the extractor and the reference allow.
        image_size: (H, W) of the samples; a reference with images of another size is refused. None for any size.

    Raises:
        ValueError: The reference does not exist, was made with another extractor, or lacks what a metric needs.
    """
    # Open.
    description, statistics, source = _open(reference, extractor)
    if source is not None and image_size is not None:
        _check_size(source, image_size)

    # Metrics that cannot be computed from the file's statistics need images.
    wanted = possible_metrics(extractor) if metrics is None else tuple(metrics)
    check_metrics(wanted, extractor)
    of_images = tuple(name for name in wanted if _needs_images(name, statistics))
    if source is None and metrics is None:
        wanted = tuple(name for name in wanted if name not in of_images)
    elif source is None and of_images:
        raise ValueError(
            f"Expected a reference with images for {list(of_images)}, got {reference} with statistics of "
            f"{list(statistics)} only. Leave these metrics out or give images."
        )

    # Features of the images, and their statistics.
    store = None
    if source is not None and of_images:
        check_metrics(of_images, extractor, num_samples=len(source))
        store = _extract(source, extractor, description, batch_size=batch_size, store_dir=store_dir)
        statistics = statistics | _statistics_of(store, of_images, extractor)
    return PreparedReference(description=description, metrics=wanted, statistics=statistics, store=store)


def _open(
    reference: str | Path | ImageSource, extractor: FeatureExtractor
) -> tuple[dict[str, Any], dict[str, FeatureStatistics], ImageSource | None]:
    """Opens the description, the statistics by output, and the images; a file may lack either of the last two."""
    if isinstance(reference, (str, Path)) and Path(reference).is_dir():
        reference = FolderImages(reference)
    if not isinstance(reference, (str, Path)):
        return describe_images(reference), {}, reference
    file = load_reference(reference, extractor=extractor)
    return {"kind": "file", "name": file.path.name, "sha256": file.sha256}, file.statistics, file.images


def _check_size(source: ImageSource, image_size: tuple[int, int]) -> None:
    size = tuple(source.read(0, 1).shape[-2:])
    if size != tuple(image_size):
        raise ValueError(
            f"Expected reference images of the samples' size {tuple(image_size)}, got {size}. Use a reference of that "
            "size, or crop and resize its images to it."
        )


def _needs_images(name: str, statistics: dict[str, FeatureStatistics]) -> bool:
    metric = METRICS[name]
    return metric.needs_reference and (metric.takes == "features" or metric.output not in statistics)


def _extract(
    source: ImageSource,
    extractor: FeatureExtractor,
    description: dict[str, Any],
    *,
    batch_size: int,
    store_dir: str | Path,
) -> FeatureStore:
    """Extracts features into a folder that later evaluations with the same reference reuse."""
    settings = {"images": description, "feature_extractor": extractor.description}
    key = hashlib.sha256(json.dumps(settings | {"batch_size": batch_size}, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(store_dir, f"reference-{key}")
    store = FeatureStore(folder, num_images=len(source), batch_size=batch_size, settings=settings)
    extract_features(source, extractor, store, label="Reference")
    return store


def _statistics_of(
    store: FeatureStore, metrics: Sequence[str], extractor: FeatureExtractor
) -> dict[str, FeatureStatistics]:
    """Computes, in the main process, the statistics that the metrics need."""
    if not PartialState().is_main_process:
        return {}
    outputs = {METRICS[name].output for name in metrics if METRICS[name].takes == "statistics"}
    return {output: store.statistics(output, extractor=extractor.fingerprint) for output in sorted(outputs)}
