# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From images and a reference to FID and its companions, over any number of processes and through kills.

`prepare_reference` checks the reference and extracts its features where it is made of images; `evaluate_images`
extracts those of what is judged and compares them; `evaluate_pipeline` is the same for a pipeline's samples, as a
training loop wants it. All processes call them together and wait for each other through Accelerate.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..distributed import on_main_process
from .feature_statistics import FeatureStatistics
from .feature_store import FeatureStore
from .frechet import frechet_distance
from .image_sources import FolderImages, PipelineImages
from .inception_score import inception_score
from .networks import FeatureExtractor
from .precision_recall import precision, recall
from .references import load_reference


# Each metric and the extractor's output that it needs.
METRICS = {"fid": "features", "sfid": "spatial", "inception_score": "logits"}
METRICS |= {"precision": "features", "recall": "features"}
_FRECHET = ("fid", "sfid")
_OF_IMAGES = ("precision", "recall")


class ImageSource(Protocol):
    """What `image_sources` has several of."""

    description: dict[str, Any]
    """By which the same images are known again, JSON."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start .. stop - 1 as [B, 3, H, W] uint8."""


@dataclass(frozen=True, kw_only=True)
class PreparedReference:
    """What samples are compared with."""

    description: dict[str, Any]
    """Name, hash and, where known, number of images."""
    metrics: tuple[str, ...]
    """What can be computed with it."""
    statistics: dict[str, FeatureStatistics]
    """By the extractor's output; in the main process only, if they were made of images."""
    store: FeatureStore | None
    """Features of its images, which precision and recall need."""


def possible_metrics(extractor: FeatureExtractor) -> tuple[str, ...]:
    """The metrics for which this extractor has the outputs."""
    return tuple(metric for metric, output in METRICS.items() if output in extractor.outputs)


def check_metrics(metrics: Sequence[str], extractor: FeatureExtractor, *, num_samples: int) -> None:
    """Raises ValueError for metrics that do not exist or that this extractor or so few samples cannot give."""
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"Expected metrics among {list(METRICS)}, got {metric!r}.")
        if METRICS[metric] not in extractor.outputs:
            raise ValueError(
                f"Expected an extractor with the output {METRICS[metric]!r} for {metric}, got {extractor.name} with "
                f"{list(extractor.outputs)}. Leave {metric} out or use 'inception'."
            )
    fewest = 4 if set(metrics) & set(_OF_IMAGES) else 2  # precision_recall looks at third neighbours
    if num_samples < fewest:
        raise ValueError(f"Expected at least {fewest} images for {list(metrics)}, got {num_samples}. Use more.")


def prepare_reference(
    reference: str | Path | ImageSource,
    *,
    extractor: FeatureExtractor,
    batch_size: int,
    store_dir: str | Path,
    metrics: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> PreparedReference:
    """Opens a reference, checks it, and extracts its features where it has no statistics; all processes together.

    Args:
        reference: An `.npz` file with statistics or images, a folder of images, or any `ImageSource`.
        extractor: The network whose features are compared.
        batch_size: Images per forward of the extractor.
        store_dir: Folder, seen by all processes, under which the features are kept, by a name for each reference.
        metrics: What will be computed; None for all that the extractor and the reference allow.
        image_size: (H, W) of the samples; a reference with images of another size is refused. None for any.

    Raises:
        ValueError: There is no such reference; it is of another extractor; it lacks what a metric needs.
    """
    description, statistics, source = _open_reference(reference, extractor)
    size = None if source is None else tuple(source.read(0, 1).shape[-2:])
    if size is not None and image_size not in (None, size):
        raise ValueError(
            f"Expected reference images of the samples' size {tuple(image_size)}, got {size}. Use a reference of that "
            "size, or crop and resize its images to it."
        )

    # Whatever it has no statistics for must be made of its images.
    wanted = possible_metrics(extractor) if metrics is None else tuple(metrics)
    of_images = [metric for metric in wanted if metric in _OF_IMAGES]
    of_images += [metric for metric in wanted if metric in _FRECHET and METRICS[metric] not in statistics]
    if source is None and metrics is None:
        wanted = tuple(metric for metric in wanted if metric not in of_images)
    elif source is None and of_images:
        raise ValueError(
            f"Expected a reference with images for {of_images}, got {reference} with statistics of {list(statistics)} "
            "only. Leave these metrics out or give images."
        )
    if source is None or not of_images:
        return PreparedReference(description=description, metrics=wanted, statistics=statistics, store=None)

    # Features, in a folder that any evaluation with this reference finds again.
    check_metrics(wanted, extractor, num_samples=len(source))
    settings = {"images": description, "feature_extractor": describe_extractor(extractor)}
    key = hashlib.sha256(json.dumps(settings | {"batch_size": batch_size}, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(store_dir, f"reference-{key}")
    store = FeatureStore(folder, num_images=len(source), batch_size=batch_size, settings=settings)
    extract_features(source, extractor, store, label="Reference")
    if PartialState().is_main_process:
        missing = {METRICS[metric] for metric in wanted if metric in _FRECHET} - set(statistics)
        made = {output: store.statistics(output, extractor=extractor.fingerprint) for output in sorted(missing)}
        statistics = statistics | made
    return PreparedReference(description=description, metrics=wanted, statistics=statistics, store=store)


def extract_features(source: ImageSource, extractor: FeatureExtractor, store: FeatureStore, *, label: str) -> None:
    """Fills a store with the features of images; batches that it has already are left alone; all processes together.

    Args:
        source: The images, as many as the store is for.
        extractor: The network.
        store: Where the features go.
        label: Of the progress bar, which counts the images of all processes.

    Raises:
        ValueError: The store holds other features; images of different sizes.
    """
    state, missing = PartialState(), store.claim()
    mine = missing[state.process_index :: state.num_processes]
    done, size = store.num_done(), None
    progress = tqdm(
        total=store.num_images, initial=done, desc=label, unit=" images", disable=not state.is_main_process
    )
    for batch in mine:
        rows = store.rows(batch)
        images = source.read(rows.start, rows.stop)  # B 3 H W
        size = size or images.shape[-2:]
        if images.shape[-2:] != size:
            raise ValueError(
                f"Expected images of one size, got {tuple(size)} and {tuple(images.shape[-2:])} in images "
                f"{rows.start} to {rows.stop - 1}. Give the resolution to which all are cropped."
            )
        store.write(batch, extractor(images))
        if state.is_main_process:
            now = store.num_done()
            progress.update(now - done)
            done = now
    state.wait_for_everyone()
    progress.update(store.num_images - done)
    progress.close()


def compute_metrics(
    samples: FeatureStore, reference: PreparedReference, *, extractor: FeatureExtractor, metrics: Sequence[str]
) -> dict[str, float]:
    """The metrics of filled stores, by name; the Inception Score also with its deviation over the parts.

    Raises:
        ValueError: The statistics are of another extractor or of too few images.
    """
    values = {}
    for metric in metrics:
        if metric in _FRECHET:
            output = METRICS[metric]
            mine = samples.statistics(output, extractor=extractor.fingerprint)
            values[metric] = frechet_distance(mine, reference.statistics[output])
    if "inception_score" in metrics:
        # As in ADM: parts of 5,000 samples, so that 50,000 are ten.
        score = inception_score(samples.features("logits"), num_splits=max(1, samples.num_images // 5000))
        values |= {"inception_score": score.mean, "inception_score_std": score.std}
    if set(metrics) & set(_OF_IMAGES):
        # Apple's GPUs know no float64.
        device = "cpu" if extractor.device.type == "mps" else extractor.device
        mine, theirs = (store.features("features").to(device) for store in (samples, reference.store))
        both = {"precision": precision, "recall": recall}
        values |= {name: compute(mine, theirs) for name, compute in both.items() if name in metrics}
    return values


def evaluate_images(
    source: ImageSource,
    *,
    extractor: FeatureExtractor,
    reference: PreparedReference,
    metrics: Sequence[str],
    batch_size: int,
    store_dir: str | Path,
) -> dict[str, float] | None:
    """Judges images; all processes together.

    The values do not depend on the number of processes. An evaluation that was killed goes on with the batches that
    `store_dir` does not hold yet.

    Args:
        source: The images.
        extractor: As for `prepare_reference`.
        reference: What `prepare_reference` gave for these metrics.
        metrics: What to compute, keys of `METRICS`.
        batch_size: Images to make, or to read, at a time.
        store_dir: Folder for the features, seen by all processes; for these images and this batch size only.

    Returns:
        The values by name in the main process, None in the others.

    Raises:
        ValueError: An impossible metric, too few images, a folder with other features.
    """
    check_metrics(metrics, extractor, num_samples=len(source))
    settings = {"images": _describe(source), "feature_extractor": describe_extractor(extractor)}
    store = FeatureStore(store_dir, num_images=len(source), batch_size=batch_size, settings=settings)
    extract_features(source, extractor, store, label="Images")
    if PartialState().is_main_process:
        return compute_metrics(store, reference, extractor=extractor, metrics=metrics)
    return None


def evaluate_pipeline(
    pipeline,
    *,
    extractor: FeatureExtractor,
    reference: PreparedReference,
    num_samples: int,
    batch_size: int,
    num_inference_steps: int,
    store_dir: str | Path,
    guidance_scale: float | None = None,
    seed: int = 0,
    metrics: Sequence[str] = ("fid",),
) -> dict[str, float] | None:
    """`evaluate_images` of a pipeline's samples; all processes together, each with the same whole pipeline.

    Args:
        pipeline: A `TREADPipeline`, on its device.
        extractor: As for `prepare_reference`.
        reference: What `prepare_reference` gave for these metrics.
        num_samples: Images to sample; papers take 50,000.
        batch_size: Images per call of the pipeline.
        num_inference_steps: Steps of the sampler.
        store_dir: Folder for the features, seen by all processes; for these weights and settings only.
        guidance_scale: Plain classifier-free guidance; None for the pipeline's guider, if it has one.
        seed: Of the samples.
        metrics: What to compute, keys of `METRICS`.

    Returns:
        The values by name in the main process, None in the others.

    Raises:
        ValueError: As `evaluate_images`.
    """
    images = PipelineImages(
        pipeline,
        num_images=num_samples,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    common = {"extractor": extractor, "reference": reference, "metrics": metrics}
    return evaluate_images(images, **common, batch_size=batch_size, store_dir=store_dir)


def _open_reference(
    reference: str | Path | ImageSource, extractor: FeatureExtractor
) -> tuple[dict[str, Any], dict[str, FeatureStatistics], ImageSource | None]:
    """Description, statistics by output and images, of which a file may lack either."""
    if isinstance(reference, (str, Path)) and Path(reference).is_dir():
        reference = FolderImages(reference)
    if not isinstance(reference, (str, Path)):
        return _describe(reference), {}, reference
    file = load_reference(reference, extractor=extractor)
    return {"kind": "file", "name": file.path.name, "sha256": file.sha256}, file.statistics, file.images


def _describe(source: ImageSource) -> dict[str, Any]:
    """The source's description in all processes; only one hashes files or weights for it."""
    return on_main_process(lambda: source.description)


def describe_extractor(extractor: FeatureExtractor) -> dict[str, str]:
    """By which the same features are known again."""
    return {"name": extractor.name, "fingerprint": extractor.fingerprint}
