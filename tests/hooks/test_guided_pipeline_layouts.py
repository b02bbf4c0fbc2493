# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How pipelines that take no guider call their transformer: those that run without text encoders, on embeddings."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import tiny_transformers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_tread import GuidedPipeline, RoutingCall, SparseGuidance, TokenRoute, apply_token_routing, token_routing
from diffusers_tread.pipelines.cfg_layouts import PIPELINE_LAYOUTS, REFUSED_PIPELINES, CfgLayout, find_layout


pytest.importorskip("transformers")

from tiny_pipelines import vae  # noqa: E402


# Which prompt an embedding stands for.
GIVEN, NULL = 0.375, -0.625


def embeddings(names, mask=None, shape=(1, 5, 12), as_list=False):
    """The arguments of both prompts, by the name of the embeddings and their masks."""
    found = {}
    for prefix, value in (("", GIVEN), ("negative_", NULL)):
        one = torch.full(shape, value)
        found[prefix + names] = [one[0]] if as_list else one
        if mask is not None:
            found[prefix + mask] = torch.ones(shape[:2], dtype=torch.bool)
    return found


MASKED = embeddings("prompt_embeds", "prompt_attention_mask")
BY_EMBEDS = embeddings("prompt_embeds", "prompt_embeds_mask")
LISTS = embeddings("prompt_embeds", as_list=True)
PLAIN = embeddings("prompt_embeds")
POOLED = embeddings("pooled_prompt_embeds", shape=(1, 6))

# By pipeline: its transformer and the embeddings.
ROWS = {
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel", MASKED),
    "BriaPipeline": ("BriaTransformer2DModel", PLAIN),
    "ChromaPipeline": ("ChromaTransformer2DModel", MASKED),
    "CogView3PlusPipeline": ("CogView3PlusTransformer2DModel", PLAIN),
    "CogView4Pipeline": ("CogView4Transformer2DModel", PLAIN),
    "ErnieImagePipeline": ("ErnieImageTransformer2DModel", LISTS),
    "Flux2KleinPipeline": ("Flux2Transformer2DModel", PLAIN),
    "Flux2Pipeline": ("Flux2Transformer2DModel", PLAIN),
    "HunyuanDiTPipeline": (
        "HunyuanDiT2DModel", MASKED | embeddings("prompt_embeds_2", "prompt_attention_mask_2", (1, 3, 16))
    ),
    "Krea2Pipeline": ("Krea2Transformer2DModel", embeddings("prompt_embeds", "prompt_embeds_mask", (1, 5, 2, 12))),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", MASKED),
    "LuminaPipeline": ("LuminaNextDiT2DModel", MASKED),
    "NucleusMoEImagePipeline": ("NucleusMoEImageTransformer2DModel", BY_EMBEDS),
    "OvisImagePipeline": ("OvisImageTransformer2DModel", PLAIN),
    "PixArtAlphaPipeline": ("PixArtTransformer2DModel", MASKED),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", MASKED),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", BY_EMBEDS),
    "SanaPipeline": ("SanaTransformer2DModel", MASKED),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", PLAIN | POOLED),
    "ZImagePipeline": ("ZImageTransformer2DModel", LISTS),
}  # fmt: skip
NAMES = [name for name, row in ROWS.items() if hasattr(diffusers, name) and hasattr(diffusers, row[0])]
# What they need besides.
CONFIGS = dict.fromkeys(["NucleusMoEImagePipeline", "QwenImagePipeline"], {"in_channels": 16, "out_channels": 4})
CONFIGS["SanaPipeline"] = {"caption_channels": 12}
DIFFUSION = ["CogView3PlusPipeline", "HunyuanDiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"]
SCALE, SETTINGS = 2.5, {"height": 64, "width": 64, "output_type": "latent", "use_resolution_binning": False}


class Pipeline:
    """A tiny pipeline with a routed transformer, whose calls are recorded as (prompts, ratio)."""

    def __init__(self, name):
        transformer_name, self.arguments = ROWS[name]
        row = tiny_transformers.row_of(transformer_name)
        torch.manual_seed(1)
        transformer = tiny_transformers.make(transformer_name, **row.config | CONFIGS.get(name, {}))
        unit = "row" if name == "SanaPipeline" else "token"
        self.router = apply_token_routing(
            tiny_transformers.randomise(transformer).eval(), TokenRoute(start=1, end=4, unit=unit)
        )
        self.router.defaults = RoutingCall(seed=3)
        self.calls, self.forward = [], transformer.forward
        transformer.forward = self.record

        cls = getattr(diffusers, name)
        parts = [
            key for key, value in inspect.signature(cls.__init__).parameters.items() if value.default is value.empty
        ]
        scheduler = (
            diffusers.DDIMScheduler(clip_sample=False) if name in DIFFUSION else FlowMatchEulerDiscreteScheduler()
        )
        if name == "CogView3PlusPipeline":
            scheduler = diffusers.CogVideoXDDIMScheduler(clip_sample=False)
        parts = dict.fromkeys(parts[1:]) | {"transformer": transformer, "scheduler": scheduler}
        parts |= {"vae": vae()} if name == "BriaPipeline" else {}
        parts |= {"vae": vae(diffusers.AutoencoderKLFlux2, latent_channels=1)} if name.startswith("Flux2") else {}
        self.pipeline = cls(**parts)
        self.pipeline.set_progress_bar_config(disable=True)
        self.layout, self.parameters = PIPELINE_LAYOUTS[name], inspect.signature(cls.__call__).parameters

    def record(self, *args, **kwargs):
        values = [set(value.unique().tolist()) for value in tensors([args, kwargs]) if value.numel()]
        prompts = tuple(sorted(set().union(*(found for found in values if found <= {GIVEN, NULL}))))
        self.calls.append((prompts, self.router.resolve().selection_ratio if self.router.is_routing(False) else 0.0))
        return self.forward(*args, **kwargs)

    def sample(self, guider=None, steps=1, scale=1.0):
        """Latents, with a guider or with the pipeline's own guidance by `scale`."""
        self.calls.clear()
        call, arguments = self.pipeline, self.arguments | SETTINGS | {"negative_prompt": None}
        if guider is None and self.layout.scale is not None:
            arguments[self.layout.scale] = scale - self.layout.offset
        elif guider is not None:
            call = GuidedPipeline(call, guider)
        arguments = {name: value for name, value in arguments.items() if name in self.parameters}
        output = call(**arguments, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        return output.images if hasattr(output, "images") else output[0]


def tensors(nest):
    """Its floating-point tensors."""
    if isinstance(nest, torch.Tensor):
        return [nest] if nest.is_floating_point() else []
    entries = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, list | tuple) else []
    return [tensor for entry in entries for tensor in tensors(entry)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_branches_are_those_of_the_guider(name):
    pipeline = Pipeline(name)

    # Sparse Guidance alone: a step is affine in the prediction.
    guided = pipeline.sample(SparseGuidance(SCALE, 0.25, 0.75))
    assert pipeline.calls == [((GIVEN,), 0.25), ((GIVEN,), 0.75)]
    alone = []
    for ratio in (0.25, 0.75):
        with token_routing(pipeline.pipeline.transformer, selection_ratio=ratio):
            alone.append(pipeline.sample())
    strong, weak = alone
    assert (strong - weak).abs().max() > 1e-4
    torch.testing.assert_close(guided, SCALE * strong + (1 - SCALE) * weak, atol=1e-4, rtol=1e-4)

    if pipeline.layout.cfg is None:
        with pytest.raises(ValueError, match="Expected null_weak_branch=False"):
            GuidedPipeline(pipeline.pipeline, SparseGuidance(SCALE, 0.25, 0.75, null_weak_branch=True))
        return

    # With classifier-free guidance: the pipeline's own, where no token is routed.
    pipeline.sample(SparseGuidance(SCALE, 0.25, 0.75, null_weak_branch=True), steps=2)
    null = () if name == "CogView3PlusPipeline" else (NULL,)  # it has zeros
    assert sorted(pipeline.calls) == [(null, 0.75)] * 2 + [((GIVEN,), 0.25)] * 2
    unrouted = pipeline.sample(SparseGuidance(SCALE, 0.0, 0.001, null_weak_branch=True), steps=2)
    torch.testing.assert_close(unrouted, pipeline.sample(scale=SCALE, steps=2), atol=1e-4, rtol=1e-4)


# Those that need a tokenizer, take no embeddings or make large images alone.
UNRUN = ["BriaFiboPipeline", "Kandinsky5T2IPipeline", "LongCatImagePipeline"]


@pytest.mark.parametrize("name", [name for name in UNRUN if hasattr(diffusers, name)])
def test_the_source_has_the_order_of_the_layout(name):
    """Of those that are not run here."""
    source = inspect.getsource(getattr(diffusers, name).__call__)
    targets = re.findall(r"(\w+) = self\.transformer\(", source)
    if PIPELINE_LAYOUTS[name].cfg == "two calls":
        assert ["uncond" in target for target in targets] == [False, True]
    else:
        assert len(targets) == 1 and re.search(r"(\w*uncond\w*), \w*text\w* = noise_pred\.chunk\(2\)", source)


def test_what_cannot_be_guided_is_refused_with_the_reason():
    for name, message in [
        ("OmniGenPipeline", "OmniGenPipeline cannot be guided: its transformer takes text"),
        ("MyPipeline", "Expected a pipeline among .* register_pipeline_layout\\('MyPipeline'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_layout(type(name, (), {})())
    with pytest.raises(ValueError, match="Expected a pipeline without a guider of its own"):
        find_layout(type("HunyuanImagePipeline", (), {"guider": None})())
    assert find_layout(type("Mine", (type("PRXPipeline", (), {}),), {})()) == CfgLayout()


def test_the_table_of_the_docs_is_that_of_the_code():
    text = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    table = text.split("<!-- pipelines -->")[1].split("<!-- end of pipelines -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    listed = {name: row[1] for row in rows for name in re.findall(r"`(\w+Pipeline)`", row[0])}
    expected = {name: "SG" if layout.cfg is None else "SG, CFG + SG" for name, layout in PIPELINE_LAYOUTS.items()}
    assert listed == expected | dict.fromkeys(REFUSED_PIPELINES, "none")
