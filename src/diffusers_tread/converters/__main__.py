# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts class-conditional transformers of other projects into `TREADPipeline`s, and ours into DiT's layout."""

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoModel

from ..files import find_pipeline, publish, sync
from ..models import TREADTransformer2DModel
from ..pipelines import TREADPipeline
from .checkpoints import SOURCES, convert_checkpoint
from .diffusers_dit import convert_diffusers_dit
from .export_dit import export_dit


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m diffusers_tread.converters") -> None:
    """Runs the command line, which is called `prog` in its help."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("checkpoint", help=_summary(convert_checkpoint)).add_argument
    add("checkpoint", help="A .safetensors file, or what torch.save wrote.")
    add("output", help="Folder to make.")
    add("--source", required=True, choices=SOURCES, help="How the network was trained.")
    add("--num_attention_heads", type=int, help="If DiT has no model of this width and depth.")
    add("--sample_size", type=int, help="Side of the training latents, if the checkpoint has no pos_embed.")
    add("--num_classes", type=int, help="Classes without the null class, if the checkpoint does not say; 0 for none.")
    add("--weights", help="Which weights of a training checkpoint: ema, model, … Default: the averaged ones.")
    add("--allow_unsafe_pickle", action="store_true", help="Read a pickle that can run any code.")
    _add_output_flags(add)

    add = commands.add_parser("diffusers", help=_summary(convert_diffusers_dit)).add_argument
    add("folder", help="Local folder of a DiTPipeline or of a DiTTransformer2DModel.")
    add("output", help="Folder to make.")
    _add_output_flags(add)

    add = commands.add_parser("to_dit", help=_summary(export_dit)).add_argument
    add("transformer", help="Local folder of a TREADTransformer2DModel, its pipeline or its run.")
    add("output", help=".safetensors file to write.")

    args = parser.parse_args(arguments)
    try:
        _run(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nStopped; nothing was written. The same command starts again.\n")


def _add_output_flags(add: Callable[..., Any]) -> None:
    add("--vae", help="Folder or Hub name of the VAE that the pipeline shall have, such as stabilityai/sd-vae-ft-ema.")
    add("--transformer_only", action="store_true", help="Write the transformer's folder, not a pipeline's.")


def _run(args: argparse.Namespace) -> None:
    if args.command == "to_dit":
        folder = Path(find_pipeline(args.transformer))
        folder = folder / "transformer" if (folder / "model_index.json").is_file() else folder
        _save_new_file(export_dit(TREADTransformer2DModel.from_pretrained(folder)), Path(args.output))
        return

    _check_new(Path(args.output))
    vae = None if args.vae is None else AutoModel.from_pretrained(args.vae, use_safetensors=True)
    if args.command == "diffusers":
        pipe = convert_diffusers_dit(args.folder, vae=vae)
    else:
        pipe = convert_checkpoint(
            args.checkpoint,
            source=args.source,
            vae=vae,
            num_attention_heads=args.num_attention_heads,
            sample_size=args.sample_size,
            num_classes=args.num_classes,
            weights=args.weights,
            allow_unsafe_pickle=args.allow_unsafe_pickle,
        )
    _save_new_folder(pipe.transformer if args.transformer_only else pipe, Path(args.output))


def _summary(function: Callable) -> str:
    return function.__doc__.split("\n")[0]


def _check_new(path: Path) -> None:
    if path.exists():
        raise ValueError(f"Expected a new name for the output, got {path}, which exists. Choose another.")


def _save_new_folder(model: "TREADPipeline | TREADTransformer2DModel", folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for path in temporary.rglob("*"):
        sync(path)
    publish(temporary, folder)


def _save_new_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    _check_new(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    safetensors.torch.save_file(tensors, temporary)
    publish(temporary, file)


if __name__ == "__main__":
    main()
