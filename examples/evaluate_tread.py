# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Computes FID, sFID, Inception Score, precision, recall and CLIPScore of a pipeline's samples or of given images.

    accelerate launch examples/evaluate_tread.py --pretrained_pipeline runs/xl2/pipeline \
        --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000 --output_dir evaluations/xl2
    accelerate launch examples/evaluate_tread.py --pretrained_pipeline runs/prx/pipeline --prompts captions.txt \
        --scorers clip --reference photos --resolution 512 --output_dir evaluations/prx

The result is the same for any number of processes. Run the same command to resume a killed evaluation.
The flags are the fields of `EvaluationConfig`, see docs/evaluation.md.
"""

import json
import re
from datetime import timedelta
from pathlib import Path

from diffusers_tread.installation import require


require("eval", "accelerate", "datasets", "psutil", "tyro")

import PIL.Image
import torch
from accelerate import PartialState

from diffusers_tread.claims import claim
from diffusers_tread.distributed import on_main_process
from diffusers_tread.metrics import (
    DatasetImages,
    EvaluationResults,
    FolderImages,
    KeptImages,
    NpzImages,
    PreparedReference,
    PromptImages,
    check_metrics,
    evaluate_images,
    is_higher_better,
    load_feature_extractor,
    load_results,
    load_scorer_file,
    load_scorers,
    possible_metrics,
    prepare_reference,
    save_statistics,
)
from diffusers_tread.pictures import add_labels, caption_grid, make_grid, name_classes, save_image
from diffusers_tread.runs.evaluation import EvaluationConfig
from diffusers_tread.runs.parsing import parse_config
from diffusers_tread.runs.sampling import check_scheduler_settings, open_pipeline_images
from diffusers_tread.runs.signals import stopped_cleanly
from diffusers_tread.runs.sweep import write_sweep


def open_folder(folder: str | Path, config: EvaluationConfig) -> FolderImages:
    return FolderImages(folder, resolution=config.resolution, background=config.background)


def open_images(config: EvaluationConfig, device: torch.device):
    """Opens the images to judge; None if only the reference's statistics are wanted."""
    if config.images is not None:
        path = Path(config.images)
        return open_folder(path, config) if path.is_dir() else NpzImages(path)
    if config.pretrained_pipeline is None:
        return None
    return open_pipeline_images(config, device, cache_dir=config.cache_dir)


def open_reference(config: EvaluationConfig):
    """Opens the reference, as a path or a source of images; None if there is none."""
    if config.reference_dataset_name is not None:
        return DatasetImages(
            config.reference_dataset_name,
            resolution=config.resolution,
            dataset_config_name=config.reference_dataset_config_name,
            split=config.reference_dataset_split,
            image_column=config.reference_image_column,
            background=config.background,
            cache_dir=config.cache_dir,
        )
    if config.reference is not None and Path(config.reference).is_dir():
        return open_folder(config.reference, config)
    return config.reference


def make_results(config: EvaluationConfig, images, values, *, extractor, reference, scorers) -> EvaluationResults:
    """Makes results of the values and everything they depend on."""
    origin = {"name_or_path": config.pretrained_pipeline, "revision": config.revision}
    return EvaluationResults(
        metrics=values,
        num_samples=len(images),
        images=(origin if config.pretrained_pipeline is not None else {}) | images.description,
        feature_extractor=extractor.description if extractor else {"name": "none"},
        reference=reference.description if reference else {"name": "none"},
        batch_size=config.batch_size,
        scorers={scorer.name: scorer.description for scorer in scorers},
    )


def results_path(config: EvaluationConfig, *, extractor, reference) -> Path:
    name = "scores"
    if reference is not None:
        names = (reference.description["name"], extractor.name)  # without folders and organisations
        name = re.sub(r"[^\w.-]+", "-", "-".join(one.rpartition("/")[2] for one in names))
    return Path(config.output_dir) / "results" / f"{name}.json"


def report(config: EvaluationConfig, images, values: dict[str, float], *, extractor, reference, scorers) -> None:
    """Writes the results file and the grid, and prints a table."""
    common = {"extractor": extractor, "reference": reference}
    # Files.
    path = results_path(config, **common)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_results(config, images, values, scorers=scorers, **common).save(path)
    if isinstance(images, KeptImages) and images.num_kept:
        save_image(draw_grid(images), path.with_suffix(".png"))

    # Table.
    against = f" against {reference.description['name']}, features of {extractor.name}" if reference else ""
    print(f"{len(images)} images{against}")
    for name, value in values.items():
        better = {True: "  higher is better", False: "  lower is better", None: ""}[is_higher_better(name)]
        print(f"  {name:20} {value:.4f}{better}")
    print(f"Saved {path}.")


def draw_grid(images: KeptImages) -> PIL.Image.Image:
    """Draws the first kept images with their prompts, or with the names of their classes."""
    first = range(min(images.num_kept, 40))
    pictures = [PIL.Image.open(images.path(index)) for index in first]
    if isinstance(images.source, PromptImages):
        return caption_grid(pictures, [images.prompt(index) for index in first])
    pipeline = images.source.pipeline
    labels, num_classes = [images.source.label(index) for index in first], pipeline.transformer.config.num_classes
    columns, texts = name_classes(labels, num_classes=num_classes, id2label=pipeline.config.id2label)
    grid = make_grid(pictures, columns=columns)
    return add_labels(grid, **texts) if texts else grid


class Judges:
    """The network, the scorers and the reference, which all points of a sweep share."""

    def __init__(self, config: EvaluationConfig, state: PartialState):
        self.config, self.extractor, self.prepared = config, None, None
        with state.main_process_first():  # one process fills the caches
            if config.has_reference:
                self.extractor = load_feature_extractor(
                    config.feature_extractor, weights=config.feature_extractor_weights, device=state.device
                )
            if config.scorer_file is not None:
                load_scorer_file(config.scorer_file)
            self.scorers = load_scorers(config.scorer_names, clip_model=config.clip_model, device=state.device)
            self.source = open_reference(config)

    def prepare_reference(self, image_size: tuple[int, int] | None) -> PreparedReference | None:
        """Prepares the reference at the first call, for images of a size; None if there is no reference."""
        if self.prepared is None and self.extractor is not None:
            config = self.config
            self.prepared = prepare_reference(
                self.source,
                extractor=self.extractor,
                metrics=config.metric_names,
                batch_size=config.batch_size,
                store_dir=config.reference_features_dir or Path(config.output_dir) / "features",
                image_size=image_size,
            )
        return self.prepared

    def find_values(self, config: EvaluationConfig, images) -> dict[str, float] | None:
        """Finds the values that an earlier run measured for the same images and settings; None if there are none."""
        # Results of an earlier run.
        if not self.config.is_sweep or (self.prepared is None and self.extractor is not None):
            return None
        known = {"extractor": self.extractor, "reference": self.prepared}
        path = results_path(config, **known)
        if not path.exists():
            return None

        # Compare their settings.
        there = load_results(path)
        now = make_results(config, images, there.metrics, scorers=self.scorers, **known)
        wanted = [*(self.prepared.metrics if self.prepared else ()), *(scorer.output for scorer in self.scorers)]
        names = ("num_samples", "images", "feature_extractor", "reference", "batch_size", "scorers")
        # As JSON, because tuples become lists in the file.
        sides = [json.dumps({name: getattr(one, name) for name in names}, sort_keys=True) for one in (there, now)]
        if sides[0] != sides[1] or not set(wanted) <= set(there.metrics):
            return None
        # Those that this run asks for, in its order, with their deviations and errors.
        values = [name + suffix for name in wanted for suffix in ("", "_std", "_standard_error")]
        return {name: there.metrics[name] for name in values if name in there.metrics}


def evaluate(config: EvaluationConfig, state: PartialState, output_dir: Path, judges: Judges) -> dict | None:
    """Evaluates images. Returns the values in the main process; None in the others, and if there are no images."""
    # Load everything and try it once, before the long work starts.
    extractor, scorers = judges.extractor, judges.scorers
    with state.main_process_first():
        images = open_images(config, state.device)
    judged = images
    if config.pretrained_pipeline is not None:
        judged = KeptImages(images, folder=output_dir / "images", num_kept=config.num_kept_images)
    values = on_main_process(lambda: judges.find_values(config, judged))
    image_size = None
    if images is not None and values is None:
        if extractor is not None:
            check_metrics(config.metric_names or possible_metrics(extractor), extractor, num_samples=len(images))
        first = images.read(0, 1)
        image_size = tuple(first.shape[-2:])
        for scorer in scorers:
            scorer(first, [images.prompt(0)])

    reference = judges.prepare_reference(image_size)
    if reference is not None and config.save_statistics is not None and state.is_main_process:
        Path(config.save_statistics).parent.mkdir(parents=True, exist_ok=True)
        save_statistics(config.save_statistics, reference.statistics)
        print(f"Saved {config.save_statistics}.")

    # Measure the images, unless an earlier run did: now the reference is known.
    values = values or on_main_process(lambda: judges.find_values(config, judged))
    if images is not None and values is None:
        common = {"extractor": extractor, "reference": reference, "scorers": scorers}
        values = evaluate_images(
            judged,
            **common,
            batch_size=config.batch_size,
            store_dir=output_dir / "features" / "images",
            scores_file=output_dir / "results" / "scores.csv" if scorers else None,
        )
        if state.is_main_process:
            report(config, judged, values, **common)
    state.wait_for_everyone()
    return values if state.is_main_process else None


def evaluate_sweep(config: EvaluationConfig, state: PartialState, output_dir: Path) -> None:
    """Evaluates each point in a folder of its own, and updates the table and the picture after each."""
    points = config.points
    for point in points:
        check_scheduler_settings(config.at(point))
    judges, rows = Judges(config, state), []
    for point in points:
        folder = output_dir / point.name
        values = evaluate(config.at(point, output_dir=str(folder)), state, folder, judges)
        if values is not None:
            rows.append({"name": point.name, "values": point.values, "metrics": values})
            num_samples = config.num_samples or (None if config.has_prompts else 50_000)
            sample = f"{num_samples:,} samples" if num_samples else "one sample per prompt"
            sample += f", seed {config.seed}"
            text = write_sweep(output_dir, rows, num_points=len(points), sample=sample)
    if rows:
        print(text)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(EvaluationConfig, argv, description=__doc__.split("\n")[0])
    # A long timeout: processes wait while the main process computes distances between all pairs of features.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    torch.backends.cudnn.allow_tf32 = False  # by default NVIDIA's convolutions round float32, which alters features
    with claim(config.output_dir) as output_dir, stopped_cleanly(argv, kept="finished batches"):
        if config.is_sweep:
            evaluate_sweep(config, state, output_dir)
        else:
            evaluate(config, state, output_dir, Judges(config, state))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
