# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Computes metrics of images and of pipelines, on any number of processes; a killed evaluation can be resumed.

Call `prepare_reference` first. `evaluate_images` extracts the features of images and compares them with the reference;
`evaluate_pipeline` does so for a pipeline's samples. All processes call these functions together and wait for each
other through Accelerate.
"""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from .extraction import describe_images, extract_features
from .feature_store import FeatureStore
from .image_sources import ImageSource
from .networks import FeatureExtractor
from .pipeline_images import PipelineImages
from .reference import PreparedReference
from .registry import METRICS, check_metrics, check_values, named_values
from .scorers import LoadedScorer
from .scores import check_scorers, mean_scores, write_scores


def evaluate_images(
    source: ImageSource,
    *,
    batch_size: int,
    store_dir: str | Path,
    extractor: FeatureExtractor | None = None,
    reference: PreparedReference | None = None,
    metrics: Sequence[str] | None = None,
    scorers: Sequence[LoadedScorer] = (),
    scores_file: str | Path | None = None,
) -> dict[str, float] | None:
    """Computes metrics and scores of images; all processes call it together.

    The values do not depend on the number of processes. A killed evaluation goes on with the batches that `store_dir`
    does not hold yet.

    Args:
        source: The images.
        batch_size: Images to sample, or to read, at a time.
        store_dir: Folder for the features, shared by all processes; only for these images and this batch size.
        extractor: As for `prepare_reference`; None to compute scores only.
        reference: The output of `prepare_reference`; None to compute scores only.
        metrics: Names of metrics; None for all that the reference was prepared for.
        scorers: The output of `load_scorers`, for a source that has prompts.
        scores_file: A .csv file for the scores of each image; None for none.

    Returns:
        The values by name in the main process, None in the others. A metric that is computed on parts of the images
        gives a mean under its own name and a standard deviation, such as `inception_score_std`. A scorer gives a mean
        and a standard error, such as `clip_score` and `clip_score_standard_error`.

    Raises:
        ValueError: A metric cannot be computed; there are too few images; the folder holds other features; or weights,
            samples, features, scores or a metric are not finite.
    """
    # Check the arguments.
    if (extractor is None) != (reference is None) or (extractor is None and not scorers):
        raise ValueError("Expected an extractor and a reference, scorers, or all of these, got something else.")
    metrics = () if reference is None else reference.metrics if metrics is None else metrics
    if extractor is not None:
        check_metrics(metrics, extractor, num_samples=len(source))
        if missing := [name for name in metrics if METRICS[name].needs_reference and name not in reference.metrics]:
            raise ValueError(
                f"Expected metrics that the reference was prepared for, {list(reference.metrics)}, got {missing}. "
                "Name them in `prepare_reference` as well."
            )
    check_scorers(scorers, source)

    # Features and scores.
    settings = {"images": describe_images(source)}
    settings |= {} if extractor is None else {"feature_extractor": extractor.description}
    settings |= {"scorers": {scorer.name: scorer.description for scorer in scorers}} if scorers else {}
    store = FeatureStore(store_dir, num_images=len(source), batch_size=batch_size, settings=settings)
    extract_features(source, extractor, store, scorers=scorers, label="Images")

    # Values.
    if not PartialState().is_main_process:
        return None
    values = {} if extractor is None else _compute(store, reference, extractor=extractor, metrics=metrics)
    scores = {scorer.output: store.features(scorer.output)[:, 0] for scorer in scorers}
    if scores_file is not None:
        write_scores(scores_file, scores, source)
    return values | mean_scores(scores)


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
    metrics: Sequence[str] | None = None,
) -> dict[str, float] | None:
    """Computes metrics of a pipeline's samples; all processes call it together, each with a full copy of the pipeline.

    Args:
        pipeline: A `TREADPipeline`, on its device.
        extractor: As for `prepare_reference`.
        reference: The output of `prepare_reference`.
        num_samples: Number of samples; papers use 50,000.
        batch_size: Samples per call of the pipeline.
        num_inference_steps: Steps of the sampler.
        store_dir: Folder for the features, shared by all processes; only for these weights and settings.
        guidance_scale: Scale of plain classifier-free guidance; None for the pipeline's guider, if it has one.
        seed: Seed of the samples.
        metrics: As for `evaluate_images`.

    Returns:
        As for `evaluate_images`.

    Raises:
        ValueError: As for `evaluate_images`.
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


def _compute(
    samples: FeatureStore, reference: PreparedReference, *, extractor: FeatureExtractor, metrics: Sequence[str]
) -> dict[str, float]:
    """Computes metrics from stored features."""
    device = "cpu" if extractor.device.type == "mps" else extractor.device  # Apple's GPUs have no float64
    values = {}
    for name in metrics:
        metric = METRICS[name]
        if metric.takes == "statistics":
            inputs = [samples.statistics(metric.output, extractor=extractor.fingerprint)]
            inputs += [reference.statistics[metric.output]] if metric.needs_reference else []
        else:
            stores = [samples, reference.store] if metric.needs_reference else [samples]
            inputs = [store.features(metric.output).to(device) for store in stores]
        values |= named_values(name, metric.compute(*inputs))
    check_values(values)
    return values
