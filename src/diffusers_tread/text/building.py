# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Builds text-to-image pipelines of diffusers from a new transformer and existing parts."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline

from ..files import find_pipeline, forget_local_paths, write_json
from ..hub_errors import ADVICE, LOST
from ..registry import add_entry


PIPELINES = {
    "PRXTransformer2DModel": "PRXPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "Lumina2Transformer2DModel": "Lumina2Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "AuraFlowTransformer2DModel": "AuraFlowPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "ChromaTransformer2DModel": "ChromaPipeline",
    "CogView4Transformer2DModel": "CogView4Pipeline",
    "BriaTransformer2DModel": "BriaPipeline",
    "OvisImageTransformer2DModel": "OvisImagePipeline",
}
"""The diffusers pipeline for each diffusers transformer, by class names."""

# Pipelines that scale noise and inputs by their scheduler, which diffusers' flow matching schedulers do not support.
_WITH_SOLVER = ("PixArtSigmaPipeline", "SanaPipeline")


def register_text_pipeline(transformer: str, pipeline: str) -> None:
    """Registers the text-to-image pipeline of a transformer, both by the names of their diffusers classes.

    Raises:
        ValueError: The transformer is already registered.
    """
    add_entry(PIPELINES, transformer, pipeline)


def make_transformer(config: Mapping[str, Any]) -> torch.nn.Module:
    """Makes a transformer of diffusers with new weights.

    Args:
        config: Settings, with the class name as `_class_name`, as in a model's `config.json`.

    Raises:
        ValueError: No pipeline is registered for the class, or it does not have one of the settings.
    """
    name = config.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(
            f"Expected the config of a transformer with `_class_name` among {sorted(PIPELINES)}, got {name!r}. "
            "Make another one known by register_text_pipeline(transformer, pipeline)."
        )
    kind = getattr(diffusers, name)
    values = {key: value for key, value in config.items() if key[0] != "_"}
    if unknown := sorted(set(values) - set(inspect.signature(kind.__init__).parameters)):
        raise ValueError(f"Expected settings of {name} in the transformer's config, got {unknown}.")
    return kind(**values)


def load_pipeline(
    pretrained: str | None = None,
    *,
    transformer: torch.nn.Module | None = None,
    parts: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> DiffusionPipeline:
    """Loads a text-to-image pipeline from a transformer and parts by name.

    Args:
        pretrained: Folder or repository of a pipeline, or a run's folder, whose parts are used unless `parts` replaces
            them.
        transformer: A new transformer, whose class determines that of the pipeline; None for that of `pretrained`.
        parts: Where to load other parts, such as {"vae": "folder", "text_encoder": ["repository", "subfolder"]}; a
            part that is None is left out of the pipeline.
        scheduler: Scheduler of a pipeline with a new transformer; PixArt and Sana get a solver with the same shift.
        dtypes: Precision of the parts, by name, and "default". Layers that must stay in float32 do, such as some of
            T5's in float16. None for float32.

    Raises:
        ValueError: A part that the pipeline needs is missing or cannot be loaded, or a part does not belong to it.
    """
    # Class and scheduler.
    pretrained = None if pretrained is None else find_pipeline(pretrained)
    if pretrained is None and transformer is None:
        raise ValueError("Expected a pretrained pipeline, the config of a transformer, or both, got neither.")
    given = {} if transformer is None else {"transformer": transformer, "scheduler": scheduler}
    kind = DiffusionPipeline if transformer is None else getattr(diffusers, PIPELINES[type(transformer).__name__])
    if kind.__name__ in _WITH_SOLVER:
        given["scheduler"] = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=scheduler.config.shift
        )

    # Parts, and the pipeline if there is one to start from.
    try:
        if pretrained is not None:
            base = DiffusionPipeline.load_config(pretrained)
            kind = _class_to_train(pretrained, base) if transformer is None else kind
        parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
        if unknown := sorted(set(parts or {}) - set(parameters)):
            raise ValueError(f"Expected parts of {kind.__name__} among {sorted(parameters)}, got {unknown}.")
        dtypes = {"default": torch.float32} | dict(dtypes or {})
        for name, place in (parts or {}).items():
            given[name] = _load_part(name, place, parameters[name], dtypes.get(name, dtypes["default"]))
        if pretrained is not None:
            missing = [name for name in parameters if name not in base and name not in given]
            optional = {name: None for name in missing if name in kind._optional_components}
            return kind.from_pretrained(pretrained, torch_dtype=dtypes, use_safetensors=True, **optional, **given)
    except LOST as error:
        raise ValueError(
            f"Expected the parts of {kind.__name__} where they were said to lie, got: {error} {ADVICE}"
        ) from error

    # Without a pipeline to start from.
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    if needed := [name for name in missing if name not in kind._optional_components]:
        example = json.dumps({name: "folder or repository" for name in needed})
        raise ValueError(f"Expected all parts of {kind.__name__}, got none for {needed}. Name them: {example}.")
    return kind(**given, **dict.fromkeys(missing))


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Saves a pipeline so that it can be loaded again, and removes local paths from its configs.

    diffusers loads the text encoder of PRX as a class of its own. When it saves this encoder, it names a class that
    does not exist, and writes a config without the section `encoder`, which is needed to load it:
    https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/prx/__init__.py
    """
    pipeline.save_pretrained(folder)
    forget_local_paths(folder)
    index = Path(folder, "model_index.json")
    content = json.loads(index.read_text(encoding="utf-8"))
    for name, entry in content.items():
        if isinstance(entry, list) and entry[1] == "T5GemmaEncoder":
            entry[0], path = "transformers", Path(folder, name, "config.json")
            config = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {"encoder": dict(config)} | config)
    write_json(index, content)


def _class_to_train(pretrained: str, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
    """The pipeline class that a `model_index.json` names, checked before anything large is downloaded."""
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None or "transformer" not in index:
        raise ValueError(
            f"Expected a pipeline of diffusers with a transformer at {pretrained!r}, got "
            f"{index.get('_class_name')!r}. Those that are known: {sorted(PIPELINES.values())}."
        )
    return kind


def _load_part(name: str, place: Any, parameter: inspect.Parameter, dtype: torch.dtype) -> Any:
    """Loads a VAE, text encoder or tokenizer."""
    if place is None:
        return None
    place, *subfolder = [place] if isinstance(place, str) else place
    options = {"subfolder": subfolder[0]} if subfolder else {}
    if not name.startswith(("text_encoder", "tokenizer", "image_encoder", "feature_extractor")):
        return AutoModel.from_pretrained(place, torch_dtype=dtype, use_safetensors=True, **options)
    import transformers

    if name.startswith("tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(place, **options)
    # The class that the pipeline names, such as the encoder half of T5, unless it is only a base class.
    kind = parameter.annotation
    is_model = isinstance(kind, type) and hasattr(kind, "from_pretrained") and "PreTrained" not in kind.__name__
    options |= {"dtype": dtype} if name.startswith(("text_encoder", "image_encoder")) else {}
    return (kind if is_model else transformers.AutoModel).from_pretrained(place, use_safetensors=True, **options)
