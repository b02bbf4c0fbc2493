# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Extracts the features and scores of images into a feature store, on any number of processes."""

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..claims import claim
from ..distributed import on_main_process
from .feature_store import FeatureStore
from .image_sources import ImageSource
from .networks import FeatureExtractor
from .scorers import LoadedScorer


def describe_images(source: ImageSource) -> dict[str, Any]:
    """Gets a source's description in all processes; only the main process hashes files or weights for it."""
    return on_main_process(lambda: source.description)


def extract_features(
    source: ImageSource,
    extractor: FeatureExtractor | None,
    store: FeatureStore,
    *,
    scorers: Sequence[LoadedScorer] = (),
    label: str,
) -> None:
    """Fills a store with the features of images, except for batches that it already holds; all processes together.

    Args:
        source: The images; their number must be that of the store.
        extractor: The network; None to compute scores only.
        store: Store for the features.
        scorers: Each rates every image for `source.prompt(index)`; scores are stored under the scorer's `output`.
        label: Label of the progress bar, which counts the images of all processes.

    Raises:
        ValueError: The store holds other features, or another run is filling it; the images differ in size.
    """
    # A complete store is only read, so that any number of evaluations can share it.
    state, missing = PartialState(), store.claim()
    if not missing:
        return
    with claim(store.folder):
        _extract_missing(source, extractor, store, state, missing, scorers=scorers, label=label)


def _extract_missing(
    source: ImageSource,
    extractor: FeatureExtractor | None,
    store: FeatureStore,
    state: PartialState,
    missing: list[int],
    *,
    scorers: Sequence[LoadedScorer],
    label: str,
) -> None:
    # Each process takes its share of the missing batches.
    mine = missing[state.process_index :: state.num_processes]

    # The main process shows the progress of all processes, by counting batches on the disk.
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
        features = {} if extractor is None else extractor(images)
        prompts = [source.prompt(index) for index in rows] if scorers else []
        store.write(batch, features | {scorer.output: scorer(images, prompts) for scorer in scorers})
        if state.is_main_process:
            now = store.num_done()
            progress.update(now - done)
            done = now

    # Other processes may take longer.
    state.wait_for_everyone()
    progress.update(store.num_images - done)
    progress.close()
