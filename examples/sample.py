# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples a pipeline into PNG files and labelled contact sheets: many images, prompts, classes, interpolations.

    accelerate launch examples/sample.py --pretrained_pipeline runs/xl2/pipeline --output_dir samples/grid \
        --mode grid --class_labels 1,207 --guidance sparse --guidance_scales 1,1.4,1.8 --weak_ratios 0.5,0.7,0.9

The images are the same for any number of processes. Run the same command to resume a killed run.
The flags are the fields of `SampleConfig`, see docs/samples-and-app.md.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers_tread.installation import require


require("eval", "accelerate", "datasets", "psutil", "tyro")

import PIL.Image
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from diffusers_tread import TREADPipeline
from diffusers_tread.claims import claim
from diffusers_tread.distributed import on_main_process
from diffusers_tread.metrics import PipelineImages, PromptImages
from diffusers_tread.pictures import add_labels, caption_grid, make_grid, name_classes, save_image
from diffusers_tread.runs.parsing import check_at_least, parse_config
from diffusers_tread.runs.sampling import SamplingConfig, make_guider, open_pipeline_images
from diffusers_tread.runs.signals import stopped_cleanly


# The modes, and the flags that only they use.
MODE_FLAGS = {
    "images": ("num_samples", "random_labels", "prompts", "prompt_dataset_name"),
    "classes": ("class_labels", "num_images_per_class"),
    "grid": ("class_labels", "guidance_scales", "weak_ratios"),
    "interpolation": ("class_labels", "num_seeds", "num_frames"),
}


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """What is sampled and shown.

    Raises:
        ValueError: A value is out of its range, or the mode or the guidance does not use a field.
    """

    output_dir: str = "samples"
    """Folder for images and sheets; all processes must share it."""
    batch_size: int = 64
    """Images per process and forward pass."""
    mode: Literal["images", "classes", "grid", "interpolation"] = "images"
    """images: many images; classes: a sheet per class; grid: a sheet of guidance scales and weak ratios per class;
    interpolation: rows from one noise to the next, per class."""
    num_samples: int | None = None
    """Mode images: number of images, cycling through the classes; None for 100, or for one per prompt."""
    class_labels: str = "all"
    """Other modes: class ids or names, separated by commas; each gets a sheet."""
    num_images_per_class: int = 100
    """Mode classes: images on a sheet."""
    guidance_scales: str = "1,1.5,2,3"
    """Mode grid: guidance scales of the columns, separated by commas."""
    weak_ratios: str = "0.5,0.7,0.9"
    """Mode grid: weak ratios of the rows, separated by commas."""
    num_seeds: int = 5
    """Mode interpolation: number of noises; each row goes from one to the next."""
    num_frames: int = 9
    """Mode interpolation: images in a row, including both ends."""

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained_pipeline is None:
            raise ValueError("Expected --pretrained_pipeline, a folder or a repository on the Hub, got none.")
        other_flags = {name for names in MODE_FLAGS.values() for name in names} - set(MODE_FLAGS[self.mode])
        given = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if unused := sorted(other_flags & given):
            raise ValueError(f"Expected only flags that --mode {self.mode} uses, got {unused}.")
        check_at_least(self, 1, "batch_size", "num_images_per_class")
        check_at_least(self, 2, "num_seeds", "num_frames")
        if self.mode == "grid" and (self.guidance != "sparse" or not (self.guidance_scale is self.weak_ratio is None)):
            raise ValueError(
                "Expected --guidance sparse with --mode grid, without --guidance_scale and --weak_ratio: "
                "--guidance_scales and --weak_ratios take their places."
            )
        self.sides()

    def sides(self) -> tuple[list[float], list[float]]:
        """The guidance scales and weak ratios of a grid. Raises ValueError if they are not numbers."""
        texts = {"guidance_scales": self.guidance_scales, "weak_ratios": self.weak_ratios}
        try:
            scales, ratios = (sorted({float(number) for number in text.split(",")}) for text in texts.values())
        except ValueError as error:
            raise ValueError(f"Expected numbers with commas between in {texts}, got {error}.") from error
        return scales, ratios


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image."""

    name: str
    """Name of its file, without suffix. The same name stands for the same image in every mode."""
    label: int | None
    """Its class; None for an image from a prompt."""
    index: int
    """Index of the sample of examples/evaluate_tread.py with the same random numbers."""
    other_index: int | None = None
    """Index of a sample towards whose noise its own is moved."""
    share: float = 0.0
    """How far its noise is moved, in [0, 1]."""
    guidance: tuple[float, float] | None = None
    """Guidance scale and weak ratio in a grid; None for the guidance of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Images side by side, row by row."""

    name: str
    title: str
    samples: list[Sample]
    rows: Sequence[str] = ()
    """Texts beside the rows."""
    columns: Sequence[str] = ()
    """Texts above the columns; if empty, there are ten columns."""
    captions: Sequence[str] = ()
    """Texts below the images, instead of all other texts."""


def read_class_labels(text: str, pipeline: TREADPipeline) -> list[int]:
    num_classes = max(pipeline.transformer.config.num_classes, 1)  # a model without classes has one label
    if text == "all":
        return list(range(num_classes))
    words = [word.strip() for word in text.split(",")]
    labels = pipeline.get_label_ids([int(word) if re.fullmatch(r"-?\d+", word) else word for word in words])
    if wrong := [label for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"Expected --class_labels in [0, {num_classes}), got {wrong}.")
    return list(dict.fromkeys(labels))


def plan_sheets(config: SampleConfig, images: PipelineImages | PromptImages) -> list[Sheet]:
    """Plans all sheets with all images, before the first one is made."""
    if config.has_prompts:
        parts = [range(len(images))[start : start + 100] for start in range(0, len(images), 100)]
        return [plan_prompts(part, images) for part in parts]
    if config.mode != "images":
        return [plan_class(config, images, label) for label in read_class_labels(config.class_labels, images.pipeline)]
    samples = [Sample(name=f"{i:06d}", label=images.label(i), index=i) for i in range(config.num_samples or 100)]
    parts = [samples[start : start + 100] for start in range(0, len(samples), 100)]
    return [plan_part(part, images.pipeline) for part in parts]


def plan_prompts(indices: Sequence[int], images: PromptImages) -> Sheet:
    """Plans a sheet of consecutive samples with their prompts."""
    samples = [Sample(name=f"{index:06d}", label=None, index=index) for index in indices]
    captions = [images.prompt(index) for index in indices]
    return Sheet(name=f"prompts-{samples[0].name}", title="", samples=samples, captions=captions)


def plan_part(samples: list[Sample], pipeline: TREADPipeline) -> Sheet:
    """Plans a sheet of consecutive samples, which cycle through the classes, with the classes' names."""
    labels, num_classes = [sample.label for sample in samples], pipeline.transformer.config.num_classes
    _, texts = name_classes(labels, num_classes=num_classes, id2label=pipeline.config.id2label)
    return Sheet(name=f"images-{samples[0].name}", title="", samples=samples, **texts)


def plan_class(config: SampleConfig, images: PipelineImages, label: int) -> Sheet:
    """Plans the sheet of one class: many images, a row per weak ratio, or a row from each noise to the next."""
    # Many images.
    pipeline = images.pipeline
    name = (pipeline.config.id2label or {}).get(str(label))
    num_classes = max(pipeline.transformer.config.num_classes, 1)
    title = f"class {label}" if name is None else f"class {label}: {name}"
    sample, sheet = partial(Sample, label=label), partial(Sheet, name=f"{config.mode}-{label:04d}", title=title)
    indices = range(label, sys.maxsize, num_classes)  # this class's samples, if samples cycle through the classes
    if config.mode == "classes":
        return sheet(samples=[sample(name=f"{i:06d}", index=i) for i in indices[: config.num_images_per_class]])

    # Guidance scales and weak ratios.
    if config.mode == "grid":
        scales, ratios = config.sides()
        samples = [
            sample(name=f"{label:04d}-weak-{ratio:g}-scale-{scale:g}", index=label, guidance=(scale, ratio))
            for ratio in ratios
            for scale in scales
        ]
        rows, columns = [f"weak {ratio:g}" for ratio in ratios], [f"w {scale:g}" for scale in scales]
        return sheet(samples=samples, rows=rows, columns=columns)

    # From each noise to the next.
    shares = [frame / (config.num_frames - 1) for frame in range(config.num_frames)]
    pairs = [(indices[i], indices[i + 1]) for i in range(config.num_seeds - 1)]
    samples = [
        sample(name=f"{label:04d}-{first}-to-{last}-{share:.4f}", index=first, other_index=last, share=share)
        for first, last in pairs
        for share in shares
    ]
    rows, columns = [f"{first} to {last}" for first, last in pairs], [f"{share:.0%}" for share in shares]
    return sheet(samples=samples, rows=rows, columns=columns)


def slerp(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """Interpolates along the great circle (Shoemake 1985), which keeps the norm of noise, unlike a straight line."""
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)


def describe(images: PipelineImages | PromptImages, config: SampleConfig) -> dict[str, Any]:
    """Everything the images depend on."""
    settings = images.description | {"batch_size": config.batch_size}
    if config.mode == "grid":  # these are in the images' names
        settings["guidance"] = settings["guidance"] | {"guidance_scale": None, "weak_ratio": None}
    return settings


def draw_samples(images: PipelineImages | PromptImages, batch: list[Sample], guiders: dict) -> list[PIL.Image.Image]:
    """Samples the images of a batch, all with the same guidance."""
    # From prompts.
    if isinstance(images, PromptImages):
        pixels = images.read(batch[0].index, batch[-1].index + 1)  # B 3 H W
        return [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]

    # From classes: noise, interpolated or not, and guidance.
    pipeline, model = images.pipeline, images.pipeline.transformer.config
    shape = (model.in_channels, model.sample_size, model.sample_size)
    generators = [images.generator(sample.index) for sample in batch]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # B C H W
    for row, sample in enumerate(batch):
        if sample.other_index is not None:
            end = torch.randn(shape, generator=images.generator(sample.other_index))
            noise[row] = slerp(noise[row], end, sample.share)
    pipeline.guider = guiders[batch[0].guidance]
    return pipeline(
        class_labels=[sample.label for sample in batch],
        **images.call_options,
        generator=generators,
        latents=noise,
    ).images


def draw_missing(
    sheets: list[Sheet], images: PipelineImages | PromptImages, guiders: dict, config: SampleConfig, *, there: set[str]
) -> None:
    """Samples the images that the folder lacks. Batches are fixed, so that a resumed run rounds in the same way."""
    # Batches with missing images.
    state, folder = PartialState(), Path(config.output_dir, "images")
    batches = []
    for guidance in guiders:
        samples = [sample for sheet in sheets for sample in sheet.samples if sample.guidance == guidance]
        batches += [samples[start : start + config.batch_size] for start in range(0, len(samples), config.batch_size)]
    missing = [batch for batch in batches if any(sample.name not in there for sample in batch)]

    # Sample them.
    label = "Sampling" if state.num_processes == 1 else f"Sampling, process 1 of {state.num_processes}"
    mine = missing[state.process_index :: state.num_processes]
    for batch in tqdm(mine, desc=label, unit="batch", disable=not state.is_main_process):
        for sample, image in zip(batch, draw_samples(images, batch, guiders), strict=True):
            if sample.name not in there:
                save_image(image, folder / f"{sample.name}.png")


def draw_sheets(sheets: list[Sheet], config: SampleConfig, state: PartialState) -> None:
    for sheet in sheets[state.process_index :: state.num_processes]:
        samples = [PIL.Image.open(Path(config.output_dir, "images", f"{sample.name}.png")) for sample in sheet.samples]
        if sheet.captions:
            picture = caption_grid(samples, sheet.captions, columns=10)
        else:
            grid = make_grid(samples, columns=len(sheet.columns) or 10)
            picture = add_labels(grid, title=sheet.title, rows=sheet.rows, columns=sheet.columns)
        save_image(picture, Path(config.output_dir, f"{sheet.name}.png"))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(SampleConfig, argv, description=__doc__.split("\n")[0])
    state = PartialState(cpu=not torch.accelerator.is_available())
    torch.backends.cudnn.allow_tf32 = False  # as examples/evaluate_tread.py, whose samples these are

    # Load and check everything before the long work starts; one process fills the caches.
    scales, ratios = config.sides() if config.mode == "grid" else ([], [])
    guiders = {(w, ratio): make_guider(config, guidance_scale=w, weak_ratio=ratio) for w in scales for ratio in ratios}
    with state.main_process_first():
        images = open_pipeline_images(config, state.device, guider=next(iter(guiders.values()), None))
    guiders = guiders or {None: None if config.has_prompts else images.pipeline.guider}
    sheets = plan_sheets(config, images)

    settings = on_main_process(lambda: describe(images, config))  # which hashes the weights
    with (
        claim(config.output_dir, settings, contents=("images/*.png",)) as folder,
        stopped_cleanly(argv, kept="finished images"),
    ):
        there = on_main_process(lambda: {file.stem for file in folder.glob("images/*.png")})
        draw_missing(sheets, images, guiders, config, there=there)
        state.wait_for_everyone()
        draw_sheets(sheets, config, state)
        state.wait_for_everyone()
    if state.is_main_process:
        num_images = sum(len(sheet.samples) for sheet in sheets)
        print(f"Saved {num_images} images and {len(sheets)} contact sheet(s) in {config.output_dir}.")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
