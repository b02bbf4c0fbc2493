# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes pipelines that diffusers loads with this package or, using code stored with the weights, without it.

    model_index.json   README.md   samples.png   pipeline.py (all that TREADPipeline needs)
    transformer/       config.json   *.safetensors   transformer_tread_2d.py
    scheduler/         scheduler_config.json   scheduling_edm_heun.py
    guider/            guider_config.json   sparse_guidance.py

and so on for each component; those of diffusers itself need no code. The file names are unusual on purpose, because
diffusers copies the code of all repositories into one folder.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..files import forget_local_paths, replace_folder
from ..models import DENOISERS
from ..objectives import OBJECTIVES
from .bundle import bundle_module
from .loadable import package_classes
from .model_card import SAMPLES, CardDetails, model_card
from .upload import upload_folder


# Replacements in the code that is stored with the weights.
_STAND_INS = {"HubPipeline": "diffusers.DiffusionPipeline"}


def export_for_hub(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    variant: str | None = None,
    card: CardDetails | None = None,
) -> Path:
    """Writes the folder that `TREADPipeline.push_to_hub` pushes, atomically.

    Load it by `TREADPipeline.from_pretrained(folder)` or, without this package, by
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. Load only the transformer by
    `AutoModel.from_pretrained(folder / "transformer", trust_remote_code=True)`.

    Args:
        pipeline: A pipeline whose components are from this package, registered with it, or from diffusers or
            transformers.
        folder: A new or empty folder, or one with a pipeline, which is replaced.
        repo_id: "organisation/name" for the card; None for the name of the folder.
        variant: Part of the weights' file names, such as "fp16".
        card: Details for the model card that the pipeline does not tell.

    Returns:
        The folder.

    Raises:
        ValueError: A component is of another kind or has adapters; the objective is your own; the folder holds other
            files; or the evaluation results are for other weights.
    """
    # Check.
    folder = Path(folder)
    _check_components(pipeline)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ValueError(f"Expected a new folder, or one with a pipeline, got {folder} with other files. Use another.")
    card = card or CardDetails()
    readme = model_card(pipeline, repo_id=repo_id or folder.resolve().name, details=card)

    # Write to a temporary folder, then rename it.
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary, variant=variant)
        _add_code(temporary, type(pipeline))
        forget_local_paths(temporary)
        readme.save(temporary / "README.md")
        if card.samples is not None:
            card.samples.save(temporary / SAMPLES)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def push_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    variant: str | None = None,
    card: CardDetails | None = None,
    **upload: Any,
) -> str:
    """Implements `TREADPipeline.push_to_hub`: arguments of `export_for_hub` and, in `upload`, of `upload_folder`."""
    with tempfile.TemporaryDirectory() as parent:
        folder = export_for_hub(pipeline, Path(parent, "pipeline"), repo_id=repo_id, variant=variant, card=card)
        upload["commit_message"] = upload.get("commit_message") or f"Upload {type(pipeline).__name__}"
        return str(upload_folder(folder, repo_id=repo_id, **upload))


def _check_components(pipeline: DiffusionPipeline) -> None:
    """Raises ValueError if a component could not be loaded again from the folder."""
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}
    ours, package = package_classes(), __name__.partition(".")[0]
    for name, part in {"pipeline": pipeline, **parts}.items():
        # A class that can be found again.
        kind = type(part)
        is_pipeline = part is pipeline and kind.__module__.partition(".")[0] == package
        is_ours = kind is ours.get(kind.__name__) or is_pipeline
        if not is_ours and kind.__module__.split(".")[0] not in ("builtins", "diffusers", "transformers"):
            raise ValueError(
                f"Expected components of diffusers_tread, diffusers or transformers, got a {name} of class "
                f"{kind.__module__}.{kind.__name__}. Load the pipeline by TREADPipeline.from_pretrained, or use "
                "save_pretrained for classes of your own."
            )
        if kind.__module__ == "__main__":
            raise ValueError(
                f"Expected a {name} whose code can be exported, got {kind.__name__} of a script or notebook. Define "
                "it in a module of its own."
            )

        # An objective of this package.
        objective = OBJECTIVES.get(part.config.get("objective")) if kind in DENOISERS.values() else None
        if objective is not None and objective.__module__.partition(".")[0] != package:
            raise ValueError(
                f"Expected an objective of diffusers_tread, whose code lies beside the weights, got "
                f"{objective.name!r} of {objective.__module__}. Use save_pretrained."
            )

        # The weights of the class, without adapters.
        if kind in DENOISERS.values():
            with torch.device("meta"):
                plain = kind.from_config(part.config)
            if others := sorted(set(part.state_dict()) ^ set(plain.state_dict())):
                raise ValueError(
                    f"Expected a {name} with the weights of its class, got others, such as {others[0]!r}. Fuse and "
                    "unload adapters (fuse_lora, unload_lora), and unfuse projections."
                )


def _add_code(folder: Path, kind: type[DiffusionPipeline]) -> None:
    """Stores the code with the weights, and makes the configs name these files instead of the package's modules."""
    # The pipeline.
    index, ours = json.loads((folder / "model_index.json").read_text()), package_classes()
    (folder / "pipeline.py").write_text(bundle_module(sys.modules[kind.__module__], stand_ins=_STAND_INS))
    index["_class_name"] = ["pipeline", kind.__name__]

    # Its components.
    for component, entry in index.items():
        if isinstance(entry, list) and entry[1] in ours:
            module = sys.modules[ours[entry[1]].__module__]
            name = module.__name__.rpartition(".")[2]
            (folder / component / f"{name}.py").write_text(bundle_module(module))
            index[component] = [name, entry[1]]
            if (config := folder / component / "config.json").exists():
                # For `AutoModel`. The second entry keeps diffusers from warning about the first (`extract_init_dict`):
                # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/configuration_utils.py
                _update(config, auto_map={"AutoModel": f"{name}.{entry[1]}"}, _use_default_values=["auto_map"])
    _update(folder / "model_index.json", **index)


def _update(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2) + "\n")
