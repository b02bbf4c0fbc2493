# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images to extract features from: samples of a pipeline, a folder, a `datasets` repository.

Each source has a length, a `description` (JSON, by which the same images are known again) and `read(start, stop)`,
which gives images start .. stop - 1 as [B, 3, H, W] uint8, in any order of calls, so that processes can share work.
Grey images become RGB.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..data import center_crop
from ..data.images import UNREADABLE
from ..files import file_sha256, publish
from ..fingerprint import weights_fingerprint
from ..seeds import derive_seed


class PipelineImages:
    """Samples of a `TREADPipeline`, each a function of the seed and its index alone.

    Sample i starts from the generator seeded with `derive_seed(seed, "evaluate", i)`, on the CPU whatever the device.

    Args:
        pipeline: Whole and on its device.
        num_images: Samples in all.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Plain classifier-free guidance; None for the pipeline's guider, if it has one.
        seed: Of the noise, and of random labels.
        random_labels: False for class i mod num_classes, as many of each class as of any other; True for independent
            uniform draws, as in ADM's and DiT's sampling scripts.
    """

    def __init__(
        self,
        pipeline,
        *,
        num_images: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        seed: int = 0,
        random_labels: bool = False,
    ):
        self.pipeline, self.num_images, self.seed, self.random_labels = pipeline, num_images, seed, random_labels
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale

    def __len__(self) -> int:
        return self.num_images

    def label(self, index: int) -> int:
        """The class of a sample."""
        choice = derive_seed(self.seed, "class", index) if self.random_labels else index
        return choice % self.pipeline.transformer.config.num_classes

    def generator(self, index: int) -> torch.Generator:
        """What all of a sample's random numbers come from, its noise first."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "evaluate", index))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[B, 3, H, W] uint8, rounded as the pipeline rounds its PIL images."""
        images = self.pipeline(
            class_labels=[self.label(index) for index in range(start, stop)],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[self.generator(index) for index in range(start, stop)],
            output_type="pt",
        ).images  # B C H W in [0, 1]
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected a pipeline of images with 1 or 3 channels, got {images.shape[1]}.")
        return (images.float() * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()

    @cached_property
    def description(self) -> dict[str, Any]:
        """Everything that the samples depend on: weights, sampler, guidance, labels, seed."""
        pipeline, guider = self.pipeline, self.pipeline.guider
        if self.guidance_scale is not None or guider is None:
            scale = self.guidance_scale or 1.0
            guidance = {"kind": "classifier-free" if scale > 1.0 else "none", "guidance_scale": scale}
        else:
            guidance = {"kind": type(guider).__name__, **_config(guider)}
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        return {
            "weights": {name: weights_fingerprint(part) for name, part in modules.items()},
            "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in modules.items()},
            "scheduler": {"class": type(pipeline.scheduler).__name__, **_config(pipeline.scheduler)},
            "num_inference_steps": self.num_inference_steps,
            "guidance": guidance,
            "labels": "random" if self.random_labels else "balanced",
            "seed": self.seed,
        }


class FolderImages:
    """The image files of a folder and its sub-folders, in the order of their paths.

    Args:
        folder: At least one image.
        resolution: Side to which `center_crop` brings them; None takes them as they are, all of one size.

    Raises:
        ValueError: No such folder, no images.
    """

    def __init__(self, folder: str | Path, *, resolution: int | None = None):
        self.folder, self.resolution = Path(folder), resolution
        known = PIL.Image.registered_extensions()
        self.paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in known)
        if not self.paths:
            raise ValueError(f"Expected a folder with images, got {folder}, in which there are none.")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[B, 3, H, W] uint8.

        Raises:
            ValueError: An unreadable file, or sizes that differ; both named.
        """
        return _stack([(_open(path), str(path)) for path in self.paths[start:stop]], self.resolution)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The digest is of the files' names and contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder).as_posix()} {file_sha256(path)}\n".encode())
        return {
            "kind": "folder",
            "name": self.folder.resolve().name,
            "num_images": len(self),
            "resolution": self.resolution,
            "sha256": digest.hexdigest(),
        }


class DatasetImages:
    """The images of a map-style `datasets` repository; it needs no labels.

    Args:
        dataset_name: On the Hub, or a local folder that `datasets.load_dataset` understands.
        resolution: Side to which `center_crop` brings them.
        dataset_config_name: Its configuration.
        split: The split to read.
        image_column: Column with images.
        cache_dir: Where `datasets` keeps its cache.

    Raises:
        ValueError: No such data set or no access; no such column, or not of images.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        resolution: int,
        dataset_config_name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        cache_dir: str | None = None,
    ):
        import datasets

        try:
            source = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
        except OSError as error:  # also what the Hub refuses, and what cannot be reached
            raise ValueError(
                f"Expected access to the data set {dataset_name}, got: {str(error).rstrip('.')}. If it is gated, as "
                "ILSVRC/imagenet-1k is, accept its terms on the Hub and log in with `hf auth login`."
            ) from error
        if not isinstance(source.features.get(image_column), datasets.Image):
            raise ValueError(
                f"Expected images in column {image_column!r} of {dataset_name}, got columns {source.features}."
            )
        self.source, self.image_column = source.select_columns([image_column]), image_column
        self.resolution = resolution
        self.name = {"name": dataset_name, "config": dataset_config_name, "split": split}

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[B, 3, R, R] uint8.

        Raises:
            ValueError: An unreadable image, named.
        """
        images = []
        for row in range(start, stop):
            try:
                images.append((self.source[row][self.image_column].convert("RGB"), f"image {row}"))
            except UNREADABLE as error:
                raise ValueError(f"Expected a readable image, got {error} in image {row} of {self.name}.") from error
        return _stack(images, self.resolution)

    @property
    def description(self) -> dict[str, Any]:
        """The version is how `datasets` names it in its cache: a commit on the Hub, a hash of files on the disk."""
        version = ["/".join(Path(file["filename"]).parts[-4:-1]) for file in self.source.cache_files[:1]]
        return {
            "kind": "dataset",
            **self.name,
            "image_column": self.image_column,
            "num_images": len(self),
            "resolution": self.resolution,
            "version": version,
        }


class KeptImages:
    """Another source that also leaves its first images as PNG files behind: `000000.png`, `000001.png`, ...

    Args:
        source: Where the images come from.
        folder: Where they go; made if missing.
        num_kept: How many of the first images are kept.
    """

    def __init__(self, source, *, folder: str | Path, num_kept: int):
        self.source, self.folder, self.num_kept = source, Path(folder), min(num_kept, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[B, 3, H, W] uint8; the files of kept ones are whole when this returns."""
        images = self.source.read(start, stop)
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, image in zip(range(start, min(stop, self.num_kept)), images, strict=False):
            temporary = self.path(index).with_suffix(".tmp")
            PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")
            publish(temporary, self.path(index))
        return images

    def path(self, index: int) -> Path:
        """Of a kept image."""
        return self.folder / f"{index:06d}.png"

    @property
    def description(self) -> dict[str, Any]:
        """The source's, and how many are kept, so that no finished batch lacks its files."""
        return self.source.description | {"num_kept": self.num_kept}


def _open(path: Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            return PIL.ImageOps.exif_transpose(image).convert("RGB")  # upright, as `datasets` gives them
    except UNREADABLE as error:
        raise ValueError(f"Expected a readable image, got {path} ({error}). Repair it or take it away.") from error


def _stack(images: list[tuple[PIL.Image.Image, str]], resolution: int | None) -> torch.Tensor:
    """Named RGB images as [B, 3, H, W] uint8."""
    arrays = []
    for image, name in images:
        arrays.append(np.array(image if resolution is None else center_crop(image, resolution)))  # H W 3
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"Expected images of one size, got {arrays[0].shape[:2]} and {arrays[-1].shape[:2]} ({name}). "
                "Give the resolution to which all are cropped."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _config(component) -> dict[str, Any]:
    """A component's settings as its JSON file has them."""
    config = json.loads(component.to_json_string())
    return {key: value for key, value in config.items() if not key.startswith("_")}
