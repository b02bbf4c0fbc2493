# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples a pipeline into PNG files and labelled contact sheets: many images, classes, grids, interpolations.

    accelerate launch examples/sample.py --pretrained_pipeline runs/xl2/pipeline --output_dir samples/grid \
        --mode grid --class_labels 1,207 --guidance sparse --guidance_scales 1,1.4,1.8 --weak_ratios 0.5,0.7,0.9

Runs on any number of processes with the same images. A killed run goes on with the same command.
docs/samples-and-app.md tells more.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from evaluate import add_sampling_flags, check_guidance, open_pipeline_images
from tqdm.auto import tqdm

from diffusers_tread import SparseGuidance, TREADPipeline
from diffusers_tread.claims import claim
from diffusers_tread.distributed import on_main_process
from diffusers_tread.metrics import PipelineImages
from diffusers_tread.pictures import add_labels, make_grid, save_image
from diffusers_tread.runs.signals import stopped_cleanly


# What is made, and the flags that only it has a use for.
MODE_FLAGS = {
    "images": ("num_samples", "random_labels"),
    "classes": ("class_labels", "num_images_per_class"),
    "grid": ("class_labels", "guidance_scales", "weak_ratios"),
    "interpolation": ("class_labels", "num_seeds", "num_frames"),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image."""

    name: str
    """Of its file, without the suffix. The same name is the same image in every mode."""
    label: int
    """Its class."""
    index: int
    """Its random numbers are those of this sample of examples/evaluate.py."""
    other_index: int | None = None
    """Whose noise its own is moved towards."""
    share: float = 0.0
    """How far, in [0, 1]."""
    guidance: tuple[float, float] | None = None
    """Guidance scale and weak ratio in a grid; None for the guidance of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Images side by side, row by row."""

    name: str
    title: str
    samples: list[Sample]
    rows: Sequence[str] = ()
    """What is written beside each row."""
    columns: Sequence[str] = ()
    """Likewise above each column; ten columns where nothing is."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", default="samples", help="Images and sheets; all processes must see it.")
    add("--batch_size", type=int, default=64, help="Images per process and forward.")
    add_sampling_flags(parser)

    add("--mode", choices=list(MODE_FLAGS), default="images", help="What to make.")
    add("--num_samples", type=int, default=100, help="images: how many, of one class after the other.")
    add(
        "--random_labels",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="images: draw classes at random, as ADM and DiT do.",
    )
    add("--class_labels", default="all", help="Other modes: ids or names with commas between; a sheet for each.")
    add("--num_images_per_class", type=int, default=100, help="classes: images on a sheet.")
    add("--guidance_scales", default="1,1.5,2,3", help="grid: the columns, with commas between.")
    add("--weak_ratios", default="0.5,0.7,0.9", help="grid: the rows, with commas between.")
    add("--num_seeds", type=int, default=5, help="interpolation: noises to pass, from each to the next in a row.")
    add("--num_frames", type=int, default=9, help="interpolation: images of a row, both ends included.")
    args = parser.parse_args(argv)

    if args.pretrained_pipeline is None:
        raise ValueError("Expected --pretrained_pipeline, a folder or a repository on the Hub, got none.")
    other_flags = {name for names in MODE_FLAGS.values() for name in names} - set(MODE_FLAGS[args.mode])
    if unused := sorted(name for name in other_flags if getattr(args, name) != parser.get_default(name)):
        raise ValueError(f"Expected only flags that --mode {args.mode} uses, got {unused}.")
    counts = {"batch_size": 1, "num_samples": 1, "num_inference_steps": 1, "num_images_per_class": 1}
    for name, fewest in (counts | {"num_seeds": 2, "num_frames": 2}).items():
        if (value := getattr(args, name)) < fewest:
            raise ValueError(f"Expected --{name} >= {fewest}, got {value}.")
    check_guidance(args)
    return check_grid(args) if args.mode == "grid" else args


def check_grid(args: argparse.Namespace) -> argparse.Namespace:
    """Reads the numbers of a grid's sides."""
    if args.guidance != "sparse" or not (args.guidance_scale is args.weak_ratio is None):
        raise ValueError(
            "Expected --guidance sparse with --mode grid, without --guidance_scale and --weak_ratio: "
            "--guidance_scales and --weak_ratios take their places."
        )
    for name in ("guidance_scales", "weak_ratios"):
        try:
            values = [float(number) for number in getattr(args, name).split(",")]
        except ValueError as error:
            raise ValueError(f"Expected numbers with commas between in --{name}, got {error}.") from error
        setattr(args, name, sorted(set(values)))
    args.guidance_scale, args.weak_ratio = args.guidance_scales[0], args.weak_ratios[0]
    return args


def read_class_labels(text: str, pipeline: TREADPipeline) -> list[int]:
    num_classes = max(pipeline.transformer.config.num_classes, 1)  # a model without classes has one label
    if text == "all":
        return list(range(num_classes))
    words = [word.strip() for word in text.split(",")]
    labels = pipeline.get_label_ids([int(word) if re.fullmatch(r"-?\d+", word) else word for word in words])
    if wrong := [label for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"Expected --class_labels in [0, {num_classes}), got {wrong}.")
    return list(dict.fromkeys(labels))


def plan_sheets(args: argparse.Namespace, images: PipelineImages) -> list[Sheet]:
    """All sheets with all images, before the first is made."""
    if args.mode != "images":
        return [plan_class(args, images, label) for label in read_class_labels(args.class_labels, images.pipeline)]
    samples = [Sample(name=f"{i:06d}", label=images.label(i), index=i) for i in range(args.num_samples)]
    parts = [samples[start : start + 100] for start in range(0, len(samples), 100)]
    return [Sheet(name=f"images-{part[0].name}", title="", samples=part) for part in parts]


def plan_class(args: argparse.Namespace, images: PipelineImages, label: int) -> Sheet:
    """The sheet of one class: many images, a row per weak ratio, or a row from each noise to the next."""
    pipeline = images.pipeline
    name = (pipeline.config.id2label or {}).get(str(label))
    num_classes = max(pipeline.transformer.config.num_classes, 1)
    title = f"class {label}" if name is None else f"class {label}: {name}"
    sheet = partial(Sheet, name=f"{args.mode}-{label:04d}", title=title)
    indices = range(label, sys.maxsize, num_classes)  # this class's samples, where classes take turns
    if args.mode == "classes":
        samples = [Sample(name=f"{i:06d}", label=label, index=i) for i in indices[: args.num_images_per_class]]
        return sheet(samples=samples)

    if args.mode == "grid":
        samples = [
            Sample(
                name=f"{label:04d}-weak-{ratio:g}-scale-{scale:g}", label=label, index=label, guidance=(scale, ratio)
            )
            for ratio in args.weak_ratios
            for scale in args.guidance_scales
        ]
        rows, columns = args.weak_ratios, args.guidance_scales
        return sheet(
            samples=samples, rows=[f"weak {one:g}" for one in rows], columns=[f"w {one:g}" for one in columns]
        )

    shares = [frame / (args.num_frames - 1) for frame in range(args.num_frames)]
    pairs = [(indices[i], indices[i + 1]) for i in range(args.num_seeds - 1)]
    samples = [
        Sample(
            name=f"{label:04d}-{first}-to-{last}-{share:.4f}", label=label, index=first, other_index=last, share=share
        )
        for first, last in pairs
        for share in shares
    ]
    rows = [f"{first} to {last}" for first, last in pairs]
    return sheet(samples=samples, rows=rows, columns=[f"{share:.0%}" for share in shares])


def slerp(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """Along the great circle (Shoemake 1985): between two noises the norm stays theirs, unlike on a straight line."""
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)


def describe(images: PipelineImages, args: argparse.Namespace) -> dict[str, Any]:
    """What the images depend on."""
    settings = images.description | {"batch_size": args.batch_size}
    if args.mode == "grid":  # these are in the images' names
        settings["guidance"] = settings["guidance"] | {"guidance_scale": None, "weak_ratio": None}
    return settings


def draw_samples(images: PipelineImages, batch: list[Sample], guiders: dict) -> list[PIL.Image.Image]:
    """The images of a batch, all with the same guidance."""
    pipeline, config = images.pipeline, images.pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    generators = [images.generator(sample.index) for sample in batch]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # B C H W
    for row, sample in enumerate(batch):
        if sample.other_index is not None:
            end = torch.randn(shape, generator=images.generator(sample.other_index))
            noise[row] = slerp(noise[row], end, sample.share)
    pipeline.guider = guiders[batch[0].guidance]
    return pipeline(
        class_labels=[sample.label for sample in batch],
        num_inference_steps=images.num_inference_steps,
        guidance_scale=images.guidance_scale,
        generator=generators,
        latents=noise,
    ).images


def draw_missing(
    sheets: list[Sheet], images: PipelineImages, guiders: dict, args: argparse.Namespace, *, there: set[str]
) -> None:
    """Makes the images that the folder lacks. Batches never change, so that a resumed run rounds as any other."""
    state, folder = PartialState(), Path(args.output_dir, "images")
    batches = []
    for guidance in guiders:
        samples = [sample for sheet in sheets for sample in sheet.samples if sample.guidance == guidance]
        batches += [samples[start : start + args.batch_size] for start in range(0, len(samples), args.batch_size)]
    missing = [batch for batch in batches if any(sample.name not in there for sample in batch)]

    label = f"Batches, {state.num_processes} processes"
    mine = missing[state.process_index :: state.num_processes]
    for batch in tqdm(mine, desc=label, disable=not state.is_main_process):
        for sample, image in zip(batch, draw_samples(images, batch, guiders), strict=True):
            if sample.name not in there:
                save_image(image, folder / f"{sample.name}.png")


def draw_sheets(sheets: list[Sheet], args: argparse.Namespace, state: PartialState) -> None:
    for sheet in sheets[state.process_index :: state.num_processes]:
        samples = [PIL.Image.open(Path(args.output_dir, "images", f"{sample.name}.png")) for sample in sheet.samples]
        grid = make_grid(samples, columns=len(sheet.columns) or 10)
        picture = add_labels(grid, title=sheet.title, rows=sheet.rows, columns=sheet.columns)
        save_image(picture, Path(args.output_dir, f"{sheet.name}.png"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    torch.backends.cudnn.allow_tf32 = False  # as examples/evaluate.py, whose samples these are

    # Everything is loaded and tried before the long work starts; one process fills the caches.
    with state.main_process_first():
        images = open_pipeline_images(args, state.device)
    sheets = plan_sheets(args, images)
    guiders = {None: images.pipeline.guider}
    if args.mode == "grid":
        sides = [(scale, ratio) for scale in args.guidance_scales for ratio in args.weak_ratios]
        change = partial(SparseGuidance.from_config, images.pipeline.guider.config)
        guiders = {(scale, ratio): change(guidance_scale=scale, weak_ratio=ratio) for scale, ratio in sides}

    settings = on_main_process(lambda: describe(images, args))  # which hashes the weights
    with (
        claim(args.output_dir, settings, contents=("images/*.png",)) as folder,
        stopped_cleanly(argv, kept="finished images"),
    ):
        there = on_main_process(lambda: {file.stem for file in folder.glob("images/*.png")})
        draw_missing(sheets, images, guiders, args, there=there)
        state.wait_for_everyone()
        draw_sheets(sheets, args, state)
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(sheets)} sheets of {sum(len(sheet.samples) for sheet in sheets)} images in {args.output_dir}.")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
