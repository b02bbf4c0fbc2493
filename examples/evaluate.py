# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FID, sFID, Inception Score, precision and recall of a pipeline's samples, or of images that are there already.

    accelerate launch examples/evaluate.py --pretrained_pipeline runs/xl2/pipeline \
        --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000 --output_dir evaluations/xl2

Runs on any number of processes with the same result. A killed evaluation goes on with the same command.
docs/evaluation.md tells more.
"""

import argparse
import inspect
import re
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
from accelerate import PartialState

import diffusers_tread
from diffusers_tread import SparseGuidance, TREADPipeline
from diffusers_tread.claims import claim
from diffusers_tread.metrics import (
    METRICS,
    DatasetImages,
    EvaluationResults,
    FolderImages,
    KeptImages,
    NpzImages,
    PipelineImages,
    PreparedReference,
    check_metrics,
    evaluate_images,
    load_feature_extractor,
    possible_metrics,
    prepare_reference,
    save_statistics,
)
from diffusers_tread.pictures import make_grid, save_image
from diffusers_tread.runs.signals import stopped_cleanly
from diffusers_tread.training.config import config_flags, read_json


# What only a pipeline has a use for.
SAMPLING_FLAGS = (
    *("revision", "dtype", "num_samples", "seed", "random_labels", "num_inference_steps", "scheduler"),
    *("scheduler_config", "guidance", "num_kept_images"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GUIDANCE_FLAGS = {
    "pipeline": (),
    "none": (),
    "cfg": ("guidance_scale",),
    "sparse": ("guidance_scale", "strong_ratio", "weak_ratio", "guider_config"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the values of `--config` over the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    flag = partial(add, action=argparse.BooleanOptionalAction, default=False)

    add("--config", help="JSON file with values for any of these flags; the command line wins.")
    add("--output_dir", default="evaluation", help="Results, features and images; all processes must see it.")
    add("--batch_size", type=int, default=64, help="Images per process and forward.")

    # What is judged.
    add("--images", help="Instead of a pipeline: a folder of images, or an .npz file with arr_0.")
    add("--resolution", type=int, help="Crop and resize images of folders and data sets to this side in pixels.")
    add("--background", default="white", help="Colour behind transparent images, such as white or #808080.")

    # What it is compared with.
    add("--reference", help="An .npz file (ADM's, or of --save_statistics) or a folder of images.")
    add("--reference_dataset_name", help="Instead: a `datasets` repository; needs --resolution.")
    add("--reference_dataset_config_name", help="Its configuration.")
    add("--reference_dataset_split", default="train", help="Its split.")
    add("--reference_image_column", default="image", help="Its column with images.")
    add("--cache_dir", help="Cache of `datasets`.")
    add("--reference_features_dir", help="Where a reference's features are kept; by default in the output folder.")
    add("--save_statistics", help="Write the reference's statistics to this .npz file, to be a --reference later.")

    # How.
    add("--metrics", help=f"Of {', '.join(METRICS)}, with commas between; by default all that are possible.")
    add(
        "--feature_extractor", default="inception", help="inception, clean-fid:clean, transformers:NAME, timm:NAME ..."
    )
    add("--feature_extractor_weights", help="A local file with its weights instead of a download.")

    # Sampling.
    add_sampling_flags(parser)
    add("--num_samples", type=int, default=50_000, help="Samples of the pipeline.")
    flag("--random_labels", help="Draw classes at random, as ADM and DiT do, instead of one after the other.")
    add(
        "--num_kept_images", type=int, default=40, help="First samples to keep as PNG files, for the grid and the eye."
    )

    # The config becomes flags in front of the command line: both are read by the same rules.
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    flags = [] if args.config is None else config_flags(args.config, known=set(vars(args)) - {"config"})
    args = parser.parse_args(flags + argv)
    if args.pretrained_pipeline is None:
        if unused := [name for name in SAMPLING_FLAGS if getattr(args, name) != parser.get_default(name)]:
            raise ValueError(f"Expected {unused} only with --pretrained_pipeline. Leave them out.")
    return check_args(args)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `load_pipeline`, and what else any sampling needs; examples/sample.py has them too."""
    add = parser.add_argument
    add("--pretrained_pipeline", help="A TREADPipeline: a folder or a repository on the Hub.")
    add("--revision", help="Branch, tag or commit of the repository.")
    add("--dtype", choices=list(DTYPES), default="float32", help="Of the transformers; the VAE stays in float32.")
    add("--seed", type=int, default=0, help="Sample i follows from this and i.")
    add("--num_inference_steps", type=int, default=40, help="Steps of the sampler.")
    add("--scheduler", help="Class of diffusers or diffusers_tread to sample with instead of the pipeline's.")
    add("--scheduler_config", default="{}", help='Changes of its settings as JSON, such as {"shift": 3.0}.')
    add("--guidance", choices=list(GUIDANCE_FLAGS), default="pipeline", help="pipeline: the guider saved with it.")
    add("--guidance_scale", type=float, help="Of cfg or sparse.")
    add("--strong_ratio", type=float, help="Of sparse: share of tokens routed away in the strong branch.")
    add("--weak_ratio", type=float, help="Of sparse: likewise in the weak branch.")
    add("--guider_config", help='More settings of SparseGuidance as JSON, such as {"stop": 0.8}.')


def check_guidance(args: argparse.Namespace) -> None:
    given = [name for name in GUIDANCE_FLAGS["sparse"] if getattr(args, name) is not None]
    if unused := sorted(set(given) - set(GUIDANCE_FLAGS[args.guidance])):
        raise ValueError(f"Expected only flags that --guidance {args.guidance} uses, got {unused}.")
    if args.guidance == "cfg" and args.guidance_scale is None:
        raise ValueError("Expected --guidance_scale with --guidance cfg, got none.")


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    for name in ("batch_size", "num_samples", "num_inference_steps", "resolution"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"Expected --{name} >= 1, got {value}.")
    args.metrics = args.metrics and args.metrics.split(",")
    if args.num_kept_images < 0:
        raise ValueError(f"Expected --num_kept_images >= 0, got {args.num_kept_images}.")
    if (args.reference is None) == (args.reference_dataset_name is None):
        raise ValueError("Expected either --reference or --reference_dataset_name, got both or neither.")
    if args.reference_dataset_name is not None and args.resolution is None:
        raise ValueError("Expected --resolution for the images of --reference_dataset_name, got none.")
    is_cropped = args.reference_dataset_name is not None or any(
        name is not None and Path(name).is_dir() for name in (args.images, args.reference)
    )
    if args.resolution is not None and not is_cropped:
        raise ValueError("Expected --resolution only with a folder or a data set: nothing else is cropped.")
    of_statistics = [name for name, metric in METRICS.items() if metric.takes == "statistics"]
    if args.save_statistics and args.metrics and not set(args.metrics) & set(of_statistics):
        raise ValueError(f"Expected any of {of_statistics} in --metrics for --save_statistics, got {args.metrics}.")
    judged = [name for name in (args.pretrained_pipeline, args.images) if name is not None]
    if len(judged) > 1 or not (judged or args.save_statistics):
        raise ValueError(
            f"Expected either --pretrained_pipeline or --images, or only --save_statistics, got {judged}."
        )
    check_guidance(args)
    return args


def load_pipeline(args: argparse.Namespace, device: torch.device) -> TREADPipeline:
    """The pipeline with the scheduler and the guider that the flags ask for."""
    try:
        pipeline = TREADPipeline.from_pretrained(args.pretrained_pipeline, revision=args.revision)
    except OSError as error:
        raise ValueError(
            f"Expected a TREADPipeline in --pretrained_pipeline, got {args.pretrained_pipeline} ({error})."
        ) from error
    pipeline.scheduler = make_scheduler(pipeline.scheduler, args.scheduler, read_json(args.scheduler_config))
    if args.guidance == "sparse":
        names = ("guidance_scale", "strong_ratio", "weak_ratio")
        settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        settings |= read_json(args.guider_config or "{}")
        check_settings(SparseGuidance, settings, "--guider_config")
        pipeline.guider = SparseGuidance(**settings)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.to(device, torch.float32 if name == "vae" else DTYPES[args.dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(scheduler, name: str | None, changes: dict[str, Any]):
    """The named scheduler, with the settings of `scheduler` that it knows and the changes."""
    kind = type(scheduler)
    if name is not None:
        kind = getattr(diffusers, name, None) or getattr(diffusers_tread, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(f"Expected a scheduler of diffusers or diffusers_tread in --scheduler, got {name!r}.")
    check_settings(kind, changes, "--scheduler_config")
    return kind.from_config(scheduler.config, **changes)


def check_settings(kind: type, settings: dict[str, Any], flag: str) -> None:
    if unknown := sorted(set(settings) - set(inspect.signature(kind.__init__).parameters)):
        raise ValueError(f"Expected settings of {kind.__name__} in {flag}, got {unknown}.")


def open_folder(folder: str | Path, args: argparse.Namespace) -> FolderImages:
    return FolderImages(folder, resolution=args.resolution, background=args.background)


def open_images(args: argparse.Namespace, device: torch.device):
    """What is judged; None if only the reference's statistics are wanted."""
    if args.images is not None:
        path = Path(args.images)
        return open_folder(path, args) if path.is_dir() else NpzImages(path)
    return None if args.pretrained_pipeline is None else open_pipeline_images(args, device)


def open_pipeline_images(args: argparse.Namespace, device: torch.device) -> PipelineImages:
    return PipelineImages(
        load_pipeline(args, device),
        num_images=args.num_samples,
        num_inference_steps=args.num_inference_steps,
        guidance_scale={"none": 1.0, "cfg": args.guidance_scale}.get(args.guidance),
        seed=args.seed,
        random_labels=args.random_labels,
    )


def open_reference(args: argparse.Namespace):
    """A path or a source of images."""
    if args.reference_dataset_name is not None:
        return DatasetImages(
            args.reference_dataset_name,
            resolution=args.resolution,
            dataset_config_name=args.reference_dataset_config_name,
            split=args.reference_dataset_split,
            image_column=args.reference_image_column,
            background=args.background,
            cache_dir=args.cache_dir,
        )
    if Path(args.reference).is_dir():
        return open_folder(args.reference, args)
    return args.reference


def report(args, images, values: dict[str, float], *, extractor, reference: PreparedReference) -> None:
    """Results file, grid, and a table for the eye."""
    output_dir = Path(args.output_dir)
    origin = {"name_or_path": args.pretrained_pipeline, "revision": args.revision}
    results = EvaluationResults(
        metrics=values,
        num_samples=len(images),
        images=(origin if args.pretrained_pipeline is not None else {}) | images.description,
        feature_extractor=extractor.description,
        reference=reference.description,
        batch_size=args.batch_size,
    )
    names = (reference.description["name"], extractor.name)  # of which folders and organisations are left out
    name = re.sub(r"[^\w.-]+", "-", "-".join(one.rpartition("/")[2] for one in names))
    path = output_dir / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.save(path)
    if isinstance(images, KeptImages) and images.num_kept:
        first = [PIL.Image.open(images.path(index)) for index in range(min(images.num_kept, 40))]
        save_image(make_grid(first), path.with_suffix(".png"))
    print(f"{len(images)} images against {reference.description['name']}, features of {extractor.name}")
    for name, value in values.items():
        better = {True: "  higher is better", False: "  lower is better"}
        print(f"  {name:20} {value:.4f}{better[METRICS[name].higher_is_better] if name in METRICS else ''}")
    print(f"Saved {path}.")


def evaluate(args: argparse.Namespace, state: PartialState, output_dir: Path) -> None:
    # Everything is loaded and tried once before the long work starts; one process fills the caches.
    with state.main_process_first():
        extractor = load_feature_extractor(
            args.feature_extractor, weights=args.feature_extractor_weights, device=state.device
        )
        images, source = open_images(args, state.device), open_reference(args)
    image_size = None
    if images is not None:
        check_metrics(args.metrics or possible_metrics(extractor), extractor, num_samples=len(images))
        image_size = tuple(images.read(0, 1).shape[-2:])

    # The reference.
    reference = prepare_reference(
        source,
        extractor=extractor,
        metrics=args.metrics,
        batch_size=args.batch_size,
        store_dir=args.reference_features_dir or output_dir / "features",
        image_size=image_size,
    )
    if args.save_statistics is not None and state.is_main_process:
        Path(args.save_statistics).parent.mkdir(parents=True, exist_ok=True)
        save_statistics(args.save_statistics, reference.statistics)
        print(f"Saved {args.save_statistics}.")

    # The images.
    if images is not None:
        if args.pretrained_pipeline is not None:
            images = KeptImages(images, folder=output_dir / "images", num_kept=args.num_kept_images)
        values = evaluate_images(
            images,
            extractor=extractor,
            reference=reference,
            metrics=reference.metrics,
            batch_size=args.batch_size,
            store_dir=output_dir / "features" / "images",
        )
        if state.is_main_process:
            report(args, images, values, extractor=extractor, reference=reference)
    state.wait_for_everyone()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # The others wait while the main process computes what may take long: distances between all pairs of features.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    torch.backends.cudnn.allow_tf32 = False  # by default NVIDIA's convolutions round float32, which moves the features
    with claim(args.output_dir) as output_dir, stopped_cleanly(argv, kept="finished batches"):
        evaluate(args, state, output_dir)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
