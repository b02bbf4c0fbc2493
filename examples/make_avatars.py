# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Draws labelled and captioned avatars into an image folder: any number, at any size, all in the public domain.

    python examples/make_avatars.py --num_images 20000 --output_dir avatars/train
    python examples/make_avatars.py --num_images 5000 --split heldout --output_dir avatars/heldout

Each style of DiceBear is a class. The same command gives the same bytes with any number of workers, resumes a killed
run, and does nothing if a run has finished. See docs/avatars.md.
"""

import argparse
import colorsys
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from diffusers_tread.installation import how_to_install, require


require("avatars", "dicebear", "dicebear_styles", "resvg_py")

import PIL.Image
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from diffusers_tread.demos.avatar_captions import STYLES, write_captions
from diffusers_tread.files import publish, write_json
from diffusers_tread.pictures import add_labels, make_grid, save_image


PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")
CC0 = "https://creativecommons.org/publicdomain/zero/1.0/"
PARTS = ".parts"  # folder with lines of metadata.jsonl, until all are there
CHUNK = 100  # images of a worker's task; a kill costs at most this many per worker
# Colours behind styles without a background of their own.
BACKGROUNDS = ["#b6e3f4", "#c0aede", "#ffd5dc", "#ffdfbf", "#d2efc4", "#fdf1b0", "#bfeee0", "#d4d6dc"]
# With its own colours, pixelbot has only 3,150 different avatars.
HUES = {"backgroundColor": (0.12, 0.6), "glowColor": (0.75, 0.9)}  # lightness and saturation

CARD = """\
# Avatars

{num_images:,} avatars at {resolution}x{resolution} pixels in {classes} classes, drawn by \
[DiceBear](https://www.dicebear.com) for diffusers-tread. No other split or seed has an avatar with the same `seed`.

| column | content |
|---|---|
| `image`, `label`, `class_name` | the picture and its style |
| `caption`, `caption_short`, `caption_tags` | what the picture shows, made from the options that drew it |
| `attributes` | these options as JSON: variants of components and colours |
| `seed` | DiceBear's seed of the picture |

```bash
diffusers-tread make-avatars {flags}
```

of diffusers-tread ({install}) made these bytes, with {versions}.

## Licences

| label | style | source | author | licence |
|---|---|---|---|---|
{rows}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", default="avatars", help="The folder to write, one for each split.")
    add("--num_images", type=int, default=20_000, help="How many; the classes take turns.")
    add("--resolution", type=int, default=64, help="Side of the images in pixels.")
    add("--styles", default=",".join(STYLES), help="The classes, with commas between.")
    add("--split", default="train", help="A name; each has avatars of its own, as has each seed.")
    add("--seed", type=int, default=0, help="Of all avatars.")
    add("--num_workers", type=int, default=os.cpu_count(), help="Processes that draw.")
    add("--sheet", metavar="PNG", help="Also save a picture of the first images of each class.")
    args = parser.parse_args(argv)

    for name, least in {"num_images": 1, "resolution": 1, "num_workers": 1, "seed": 0}.items():
        if (value := getattr(args, name)) < least:
            raise ValueError(f"Expected --{name} >= {least}, got {value}.")
    if not re.fullmatch(r"\w+", args.split, re.ASCII):
        raise ValueError(f"Expected --split of letters, digits and underscores, got {args.split!r}.")
    args.styles = sorted(set(args.styles.split(",")))  # the order in which `datasets` numbers folders
    if unknown := sorted(set(args.styles) - set(STYLES)):
        raise ValueError(f"Expected --styles among {', '.join(STYLES)}, got {unknown}.")
    return args


@lru_cache
def read_style(name: str) -> dict[str, Any]:
    """Reads the definition of a style.

    Raises:
        ValueError: The style is not in the public domain.
    """
    definition = json.loads(resources.files("dicebear_styles").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    licence = definition["meta"]["license"]
    if licence["url"] != CC0:
        raise ValueError(f"Expected styles under CC0 1.0, got {licence['name']} for {name}. Leave it out of --styles.")
    return definition


@lru_cache
def open_style(name: str) -> Any:
    """Opens a style to draw with, which takes about 0.3 s for validation."""
    from dicebear import Style

    return Style(read_style(name))


def make_hues(lightness: float, saturation: float) -> list[str]:
    """Makes 72 colours around the colour wheel."""
    wheel = [colorsys.hls_to_rgb(hue / 72, lightness, saturation) for hue in range(72)]
    return ["#" + "".join(f"{round(255 * value):02x}" for value in rgb) for rgb in wheel]


def draw(name: str, *, seed: str, resolution: int) -> tuple[PIL.Image.Image, dict[str, Any]]:
    """Draws an avatar as an opaque RGB image; also returns the variants and colours that the seed chose."""
    import resvg_py
    from dicebear import Avatar

    # Draw.
    zoom = -(-64 // resolution)  # small images are averaged from larger ones, to keep fine lines
    style = open_style(name)
    options = {} if "background" in style.colors() else {"backgroundColor": BACKGROUNDS}
    if name == "pixelbot":
        options |= {color: make_hues(*tone) for color, tone in HUES.items()}
    avatar = Avatar(style, options | {"seed": seed, "size": zoom * resolution}).to_json()
    png = resvg_py.svg_to_bytes(svg_string=avatar["svg"], background="white", skip_system_fonts=True)

    # The options that the seed chose.
    chosen = {
        key.removesuffix("Variant"): value[0] if key.endswith("Color") else value
        for key, value in avatar["options"].items()
        if value and key.endswith(("Variant", "Color")) and key != "animationVariant"
    }
    return PIL.Image.open(io.BytesIO(png)).convert("RGB").reduce(zoom), chosen


def draw_chunk(first: int, *, folder: Path, settings: dict[str, Any]) -> int:
    """Draws the chunk of images from number `first` on and writes its lines of metadata.jsonl; returns its size."""
    styles, lines = settings["styles"], []
    for number in range(first, min(first + CHUNK, settings["num_images"])):
        # Draw.
        index, label = divmod(number, len(styles))
        style = styles[label]
        seed = f"{settings['seed']}-{settings['split']}-{style}-{index}"
        image, chosen = draw(style, seed=seed, resolution=settings["resolution"])

        # Save.
        name = f"{style}/{style}-{index:07d}.png"
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        image.save(path.with_suffix(".tmp"), format="PNG")
        os.replace(path.with_suffix(".tmp"), path)  # not flushed, which would take longer than drawing

        # Describe.
        row = {"file_name": name, "label": label, "class_name": style}
        row |= write_captions(style, chosen, pick=zlib.crc32(seed.encode()))
        lines.append(json.dumps(row | {"attributes": json.dumps(chosen), "seed": seed}) + "\n")
    write_text(folder / PARTS / f"{first:09d}.jsonl", "".join(lines))
    return len(lines)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def follow_parent() -> None:
    """Ends this worker when the process that started it is killed, and leaves Ctrl-C to that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def draw_missing(folder: Path, settings: dict[str, Any], *, num_workers: int) -> None:
    """Draws the chunks that the folder lacks."""
    # What is missing.
    (folder / PARTS).mkdir(exist_ok=True)
    total = settings["num_images"]
    missing = [first for first in range(0, total, CHUNK) if not (folder / PARTS / f"{first:09d}.jsonl").exists()]
    work = partial(draw_chunk, folder=folder, settings=settings)
    for style in settings["styles"] if missing else []:
        open_style(style)  # only once if workers are forked

    # Draw it in parallel.
    with ProcessPoolExecutor(num_workers, initializer=follow_parent) as pool:
        futures = [pool.submit(work, first) for first in missing]
        there = total - sum(min(CHUNK, total - first) for first in missing)
        try:
            with tqdm(total=total, initial=there, desc="Drawing", unit="image") as progress:
                for future in as_completed(futures):
                    progress.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Creates the folder for this run, or checks that it belongs to a run with the same settings.

    Raises:
        ValueError: The folder holds other files, or images with other settings.
    """
    path = folder / "settings.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if known is None:
        if folder.exists() and (names := sorted(p.name for p in folder.iterdir() if p.name != "settings.json.tmp")):
            raise ValueError(f"Expected an empty or a new --output_dir, got {folder} with {names[:5]}. Use another.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    elif differences := sorted(name for name in known | settings if known.get(name) != settings.get(name)):
        raise ValueError(
            f"Expected images of the same settings in {folder}, got others: {differences} differ from {path}. Use "
            "another --output_dir."
        )


def make_card(settings: dict[str, Any]) -> DatasetCard:
    """Makes the folder's README.md: where the images come from, and metadata for the Hub and `datasets`."""
    # Metadata.
    styles, split = settings["styles"], settings["split"]
    names = {str(label): style for label, style in enumerate(styles)}
    texts = "class_name caption caption_short caption_tags attributes seed".split()
    features = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
        *({"name": text, "dtype": "string"} for text in texts),
    ]
    paths = ["metadata.jsonl", *(f"{style}/*.png" for style in styles)]
    data = DatasetCardData(
        license="cc0-1.0",
        pretty_name="Avatars",
        task_categories=["text-to-image", "unconditional-image-generation"],
        tags=["diffusers-tread", "dicebear", "synthetic"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": paths}], "features": features}],
    )

    # Table of licences.
    rows = []
    for label, style in enumerate(styles):
        meta = read_style(style)["meta"]
        links = [f"[{meta[key]['name']}]({meta[key]['url']})" for key in ("source", "creator", "license")]
        rows.append(" | ".join([f"| {label}", style, *links]) + " |")

    # Text.
    flags = {name: settings[name] for name in ("num_images", "resolution", "split", "seed")}
    flags |= {} if set(styles) == set(STYLES) else {"styles": ",".join(styles)}
    text = CARD.format(
        **settings | {"versions": ", ".join(f"{name} {version}" for name, version in settings["versions"].items())},
        classes=len(styles),
        flags=" ".join(f"--{name} {value}" for name, value in flags.items()),
        rows="\n".join(rows),
        install=how_to_install(),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def finish(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the card and, last, metadata.jsonl, which marks the folder as complete."""
    parts = sorted((folder / PARTS).glob("*.jsonl"))
    os.sync()  # the images
    write_text(folder / "README.md", str(make_card(settings)))
    write_text(folder / "metadata.jsonl", "".join(part.read_text(encoding="utf-8") for part in parts))


def save_sheet(folder: Path, settings: dict[str, Any], path: Path) -> None:
    """Draws the first images of each class next to its name, half of the classes on each side."""
    styles = settings["styles"][: settings["num_images"]]  # those that have images
    columns = min(5, settings["num_images"] // len(styles))
    half = -(-len(styles) // 2)
    sides = []
    for names in filter(None, (styles[:half], styles[half:])):
        images = [PIL.Image.open(folder / name / f"{name}-{i:07d}.png") for name in names for i in range(columns)]
        sides.append(add_labels(make_grid(images, columns=columns), rows=names))
    picture = PIL.Image.new("RGB", (sum(side.width for side in sides), sides[0].height), "white")
    for side, left in zip(sides, (0, sides[0].width), strict=False):
        picture.paste(side, (left, 0))
    save_image(picture, path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for style in args.styles:
        read_style(style)

    # Settings.
    settings = {name: getattr(args, name) for name in ("num_images", "resolution", "split", "seed", "styles")}
    settings["versions"] = {name: metadata.version(name) for name in [*PACKAGES, "pillow"]}

    # Draw.
    folder = Path(args.output_dir)
    claim_folder(folder, settings)
    if not (folder / "metadata.jsonl").exists():
        try:
            draw_missing(folder, settings, num_workers=args.num_workers)
        except KeyboardInterrupt:
            command = shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
            print(f"\nStopped; the finished avatars are kept. To go on: {command}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        finish(folder, settings)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    if args.sheet is not None:
        save_sheet(folder, settings, Path(args.sheet))
    print(f"{folder} holds {args.num_images} avatars in {len(args.styles)} classes.")


if __name__ == "__main__":
    main()
