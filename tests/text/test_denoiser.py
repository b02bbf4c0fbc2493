# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""`PipelineDenoiser` against calls of the transformers written out by hand."""

import math
from types import SimpleNamespace

import pytest
import test_guided_pipeline_layouts as layouts
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from tiny_pipelines import PIPELINES
from tiny_transformers import make

from diffusers_tread import FlowMatchingObjective, RoutingCall, apply_token_routing
from diffusers_tread.text import PIPELINES as PIPELINES_BY_TRANSFORMER
from diffusers_tread.text import PipelineDenoiser, PromptEncoder


LATENTS, TIMESTEP = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([200.0, 900.0])

LUMINA2 = {"num_kv_heads": 1, "axes_dim_rope": (4, 2, 2), "axes_lens": (20, 8, 8)}


@pytest.fixture(params=sorted(PIPELINES))
def pipeline(request, tmp_path):
    torch.manual_seed(0)
    pipeline = PIPELINES[request.param](tmp_path / "parts")
    with torch.no_grad():  # some gates start at zero
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(part is pipeline.transformer).eval()
    return pipeline


def make_denoiser(pipeline, **options):
    encoder = PromptEncoder(pipeline)
    shape = {"latents_shape": (4, 8, 8), "pixels_per_latent": 2}
    return PipelineDenoiser(pipeline, text=encoder([""]), **shape, **options), encoder(["a red square", "blue"])


def by_hand(pipeline, latents, timestep, text):
    transformer, name = pipeline.transformer, type(pipeline).__name__
    if name == "FluxPipeline":
        patches = latents.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
        ids = torch.zeros(4, 4, 3)
        ids[..., 1], ids[..., 2] = torch.arange(4.0)[:, None], torch.arange(4.0)[None]
        embeds, pooled, text_ids = text
        given = {"guidance": torch.ones(2), "img_ids": ids.view(16, 3), "txt_ids": text_ids}
        sample = transformer(patches, embeds, pooled, timestep / 1000, **given).sample
        return sample.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)
    if name == "PRXPipeline":
        given = {"encoder_hidden_states": text[0], "attention_mask": text[1]}
        return transformer(latents, timestep=timestep / 1000, **given).sample
    return transformer(latents, text[0], text[2], timestep).sample


def test_the_velocity_is_the_transformers_own_at_each_samples_timestep(pipeline):
    denoiser, text = make_denoiser(pipeline)
    with torch.no_grad():
        velocity = denoiser(LATENTS, TIMESTEP, text).sample
        torch.testing.assert_close(velocity, by_hand(pipeline, LATENTS, TIMESTEP, text), rtol=1e-5, atol=1e-5)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert "encode_prompt" not in vars(pipeline) and denoiser.inputs["hidden_states"].shape[0] == 1


def test_the_loss_and_its_gradients_are_those_of_the_bare_transformer(pipeline):
    denoiser, text = make_denoiser(pipeline)
    objective, seed = FlowMatchingObjective(), torch.Generator().manual_seed
    objective.loss(denoiser, LATENTS, generator=seed(0), text=text).mean().backward()
    parameters = list(pipeline.transformer.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    pipeline.transformer.zero_grad()

    def bare(hidden_states, timestep):
        return SimpleNamespace(sample=by_hand(pipeline, hidden_states, timestep, text))

    objective.loss(bare, LATENTS, generator=seed(0)).mean().backward()
    for one, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_routing_of_a_call_reaches_the_transformer(pipeline):
    apply_token_routing(pipeline.transformer, {"start": 1, "end": -3})
    denoiser, text = make_denoiser(pipeline)
    with torch.no_grad():
        dense = denoiser(LATENTS, TIMESTEP, text).sample
        one, same, other = (
            denoiser(LATENTS, TIMESTEP, text, routing=RoutingCall(enabled=True, seed=seed)).sample
            for seed in (1, 1, 2)
        )
        denoiser.train()
        unrouted = denoiser(LATENTS, TIMESTEP, text, routing=RoutingCall(enabled=False, seed=1)).sample
    assert torch.equal(one, same) and torch.equal(dense, unrouted)
    assert not torch.allclose(one, other) and not torch.allclose(one, dense)


def test_latents_that_are_no_squares_are_told_their_size(pipeline):
    denoiser, text = make_denoiser(pipeline)
    with torch.no_grad():
        wide = denoiser(LATENTS.reshape(2, 4, 4, 16)[..., :12], TIMESTEP, text).sample
    assert wide.shape == (2, 4, 4, 12)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_timesteps_stay_on_the_device(name, tmp_path):
    """Which those pipelines give as the scheduler has them; nothing of the meta device can be copied off it."""
    pipeline = PIPELINES[name](tmp_path / "parts")
    text = PromptEncoder(pipeline)([""])
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to("meta")
    text = tuple(one.to("meta") if isinstance(one, torch.Tensor) else one for one in text)
    denoiser = PipelineDenoiser(pipeline, text=text, latents_shape=(4, 8, 8), pixels_per_latent=2)
    assert denoiser(LATENTS[:1].to("meta"), TIMESTEP[:1].to("meta"), text).sample.shape == (1, 4, 8, 8)


def test_what_cannot_be_trained_is_refused(pipeline):
    if not pipeline.transformer.config.get("guidance_embeds"):
        with pytest.raises(ValueError, match="guidance_embeds"):
            make_denoiser(pipeline, call_options={"guidance_scale": 3.0})
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler()
    with pytest.raises(ValueError, match="for flow matching.*got one with DDIMScheduler"):
        make_denoiser(pipeline)
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match="do not fit each other"):
        PipelineDenoiser(pipeline, text=PromptEncoder(pipeline)([""]), latents_shape=(8, 8, 8), pixels_per_latent=2)
    with pytest.raises(ValueError, match="do not fit each other"):
        PipelineDenoiser(pipeline, text=PromptEncoder(pipeline)([""]), latents_shape=(4, 8, 7), pixels_per_latent=2)


class Predicted(Exception):
    """Ends a pipeline's own call."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in PIPELINES_BY_TRANSFORMER.values() if name in layouts.NAMES])
def test_every_pipeline_of_the_table_predicts_as_its_own_call_does(name):
    """Lumina 2 counts time backwards and negates, Qwen-Image packs, Sana has its own time, and so on."""
    tiny, own = layouts.Pipeline(name), {}
    pipeline, encode = tiny.pipeline, type(tiny.pipeline).encode_prompt
    if name in ("PixArtSigmaPipeline", "SanaPipeline"):
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        pipeline.scheduler = DPMSolverMultistepScheduler(**options)

    # The first step of the pipeline's own call, on its embeddings.
    def encoding(*args, **kwargs):
        own["text"] = encode(pipeline, *args, **kwargs)
        return own["text"]

    def stepping(model_output, timestep, sample, **kwargs):
        own.update(prediction=model_output, timestep=timestep, latents=sample)
        raise Predicted

    pipeline.encode_prompt, pipeline.scheduler.step = encoding, stepping
    with pytest.raises(Predicted):
        tiny.sample()
    del pipeline.encode_prompt, pipeline.scheduler.step

    # The same through the denoiser.
    latents, pack = own["latents"], getattr(pipeline, "_pack_latents", None)
    if pack is not None:
        side = math.isqrt(latents.shape[1])
        shape = (1, latents.shape[2] // 4, 2 * side, 2 * side)
        order = pack(torch.arange(latents.numel()).view(shape), *shape).flatten()
        latents = torch.empty(latents.numel()).scatter_(0, order, latents.flatten()).view(shape)
    denoiser = PipelineDenoiser(
        pipeline, latents_shape=latents.shape[1:], text=own["text"], pixels_per_latent=64 // latents.shape[2]
    )
    timestep = own["timestep"].reshape(1).float()
    with torch.no_grad():
        prediction = denoiser(latents, timestep, own["text"]).sample
        other = denoiser(latents, timestep / 2, own["text"]).sample
    assert not torch.allclose(prediction, other)
    prediction = prediction if pack is None else pack(prediction, *prediction.shape)
    torch.testing.assert_close(prediction, own["prediction"].float())


def test_each_sample_has_its_timestep_where_time_is_counted_otherwise():
    """Lumina 2 counts time backwards and negates; AuraFlow takes t in [0, 1] and a mask."""
    logging.disable_progress_bar()
    from diffusers import AuraFlowPipeline, Lumina2Pipeline
    from tiny_pipelines import vae

    cases = {
        Lumina2Pipeline: ("Lumina2Transformer2DModel", LUMINA2, lambda t: 1 - t / 1000, -1),
        AuraFlowPipeline: ("AuraFlowTransformer2DModel", {}, lambda t: t / 1000, 1),
    }
    for kind, (name, config, time, sign) in cases.items():
        torch.manual_seed(0)
        transformer = make(name, **config).eval()
        width = transformer.config.get("cap_feat_dim") or transformer.config.get("joint_attention_dim")
        pipeline = kind(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=None,
            tokenizer=None,
        )  # fmt: skip
        mask = torch.ones(2, 5, dtype=torch.bool if kind is Lumina2Pipeline else torch.int64)
        text = (torch.randn(2, 5, width), mask, None, None)
        first = (text[0][:1], mask[:1], None, None)
        shape = {"latents_shape": (4, 8, 8), "pixels_per_latent": 2}
        denoiser = PipelineDenoiser(pipeline, text=first, **shape)
        with torch.no_grad():
            velocity = denoiser(LATENTS, TIMESTEP, text).sample
            given = {"encoder_attention_mask": mask} if kind is Lumina2Pipeline else {}
            own = transformer(LATENTS, encoder_hidden_states=text[0], timestep=time(TIMESTEP), **given).sample
        torch.testing.assert_close(velocity, sign * own, rtol=1e-5, atol=1e-5)
