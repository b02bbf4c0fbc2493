# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How diffusers' text-to-image pipelines call their transformer under classifier-free guidance (CFG)."""

from dataclasses import dataclass
from typing import Any, Literal

from ..field_docs import with_field_docs
from ..registry import add_entry


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class CfgLayout:
    """How one pipeline class calls its transformer in a step. Without CFG each calls it once, with the prompt."""

    cfg: Literal["null first", "given first", "two calls"] | None = "null first"
    """With CFG: one call on the batch [without prompt, with prompt], one on [with, without], or one call with the
    prompt and then one without. None: it has no CFG that can be routed."""

    scale: str | None = "guidance_scale"
    """The pipeline's argument for the CFG scale; None if it has none."""

    offset: float = 0.0
    """The scale of this package minus that of the pipeline: 1.0 if the pipeline's scale 0 means no guidance."""

    shared: tuple[str, ...] = ()
    """The transformer's arguments without a sample axis."""

    sample_lists: bool = False
    """Whether lists among the transformer's arguments have one entry per sample."""


PIPELINE_LAYOUTS: dict[str, CfgLayout] = {}


def register_pipeline_layout(pipeline: str, layout: CfgLayout) -> None:
    """Lets `GuidedPipeline` accept pipelines of the class with that name, and of its subclasses.

    Raises:
        ValueError: The name has another layout.
    """
    add_entry(PIPELINE_LAYOUTS, pipeline, layout)


for _name in (
    "AuraFlowPipeline", "CogView3PlusPipeline", "ErnieImagePipeline", "PRXPipeline", "PixArtAlphaPipeline",
    "PixArtSigmaPipeline", "SanaPipeline", "StableDiffusion3Pipeline",
):  # fmt: skip
    register_pipeline_layout(_name, CfgLayout())
for _name in ("BriaFiboPipeline", "BriaPipeline"):
    register_pipeline_layout(_name, CfgLayout(shared=("img_ids", "txt_ids")))
register_pipeline_layout("HunyuanDiTPipeline", CfgLayout(shared=("image_rotary_emb",)))
register_pipeline_layout("LuminaPipeline", CfgLayout(cfg="given first", shared=("image_rotary_emb",)))
register_pipeline_layout("ZImagePipeline", CfgLayout(cfg="given first", offset=1.0, sample_lists=True))
for _name in (
    "ChromaPipeline", "CogView4Pipeline", "Flux2KleinPipeline", "Kandinsky5T2IPipeline", "LongCatImagePipeline",
    "Lumina2Pipeline", "NucleusMoEImagePipeline", "OvisImagePipeline",
):  # fmt: skip
    register_pipeline_layout(_name, CfgLayout(cfg="two calls"))
register_pipeline_layout("Krea2Pipeline", CfgLayout(cfg="two calls", offset=1.0))
for _name in ("FluxPipeline", "QwenImagePipeline"):
    register_pipeline_layout(_name, CfgLayout(cfg="two calls", scale="true_cfg_scale"))
# Flux 2 has no CFG; HiDream's arguments have the samples on two different axes.
register_pipeline_layout("Flux2Pipeline", CfgLayout(cfg=None, scale=None))
register_pipeline_layout("HiDreamImagePipeline", CfgLayout(cfg=None))

REFUSED_PIPELINES = {
    "GlmImagePipeline": "it also calls its transformer to fill a cache, which routing does not go with",
    "Ideogram4Pipeline": "another transformer of its own makes the prediction without prompt in every step",
    "OmniGenPipeline": "its transformer takes text, images and samples as one packed sequence",
}


def find_layout(pipeline: Any) -> CfgLayout:
    """The layout of a pipeline's class, or of its nearest base class that has one.

    Raises:
        ValueError: The pipeline takes a guider itself; it cannot be guided (with the reason); or it has no registered
            layout.
    """
    name = type(pipeline).__name__
    if hasattr(pipeline, "guider"):
        raise ValueError(
            f"Expected a pipeline without a guider of its own, got {name}. Give it the guider: pipeline.guider = ..., "
            "or pipeline.update_components(guider=...) in Modular Diffusers."
        )
    for parent in type(pipeline).__mro__:
        if parent.__name__ in REFUSED_PIPELINES:
            raise ValueError(f"{name} cannot be guided: {REFUSED_PIPELINES[parent.__name__]}.")
        if parent.__name__ in PIPELINE_LAYOUTS:
            return PIPELINE_LAYOUTS[parent.__name__]
    raise ValueError(
        f"Expected a pipeline among {sorted(PIPELINE_LAYOUTS)}, got {name}. Say how it calls its transformer: "
        f"register_pipeline_layout({name!r}, CfgLayout(...))."
    )
