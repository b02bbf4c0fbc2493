# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""JiT's objective in JiT's own time, on Gaussian data with a known posterior, and all the way through the pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from sklearn.datasets import load_digits

from diffusers_tread import (
    EDMHeunScheduler,
    FlowMatchingObjective,
    FlowSDEScheduler,
    JiTObjective,
    RoutingCall,
    SparseGuidance,
    TREADPipeline,
    TREADTransformer2DModel,
)
from diffusers_tread.hub import export_for_hub
from diffusers_tread.objectives import LossTerm, ReconstructionLoss


MEAN, STD = 0.3, 0.8  # of the Gaussian data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(**changes):
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "sample_size": 8, "in_channels": 1}
    config |= {"num_classes": 10, "patch_size": 2, "patch_bottleneck_dim": 3, "objective": "jit"}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TREADTransformer2DModel(**config | changes)


def stirred(model):
    """With an output that depends on everything: at initialisation it is 0."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded(1))
    return model.eval()


class Watch(LossTerm):
    @classmethod
    def for_model(cls, model):
        return cls()

    def __call__(self, record):
        self.record = record
        return torch.zeros(len(record.latents))


@pytest.mark.parametrize("logit_mean", [0.8, -4.0])  # the paper's, and times below 0.05
def test_the_loss_is_that_of_the_paper_in_the_paper_s_time(logit_mean):
    images, labels, model, watch = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6), stirred(make_model()), Watch()
    settings = {"class_labels": labels, "routing": RoutingCall(seed=3, enabled=True), "generator": seeded()}
    loss = JiTObjective(logit_mean=logit_mean).loss(model, images, terms=(watch,), **settings)

    # The data are at t = 1 there.
    generator = seeded()
    normal, noise = (torch.randn(shape, generator=generator).double().numpy() for shape in ((6,), images.shape))
    t = (1 / (1 + np.exp(logit_mean + 0.8 * normal)))[:, None, None, None]
    x = images.double().numpy()
    z = t * x + (1 - t) * noise
    timestep = torch.from_numpy(1000 * (1 - t)).flatten().float()
    with torch.no_grad():
        network = model(torch.from_numpy(z).float(), timestep, labels, routing=settings["routing"]).sample
    width = np.maximum(1 - t, 0.05)
    v, v_predicted = (x - z) / width, (network.double().numpy() - z) / width
    np.testing.assert_allclose(loss.detach(), ((v - v_predicted) ** 2).mean((1, 2, 3)), rtol=1e-3)
    assert (width == 0.05).any() == (logit_mean < 0)

    # Terms see the velocity, and x as the estimate of the clean image.
    np.testing.assert_allclose(watch.record.prediction.detach(), -v_predicted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(watch.record.denoise(watch.record.prediction.detach()), network, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(watch.record.denoise(watch.record.target), x, rtol=1e-3, atol=1e-4)


def test_times_are_those_of_the_paper_with_noise_at_one():
    timestep = JiTObjective().corrupt(torch.zeros(20_000, 1, 1, 1), seeded()).timestep
    logit = torch.logit(1 - timestep / 1000)  # of the paper's t
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.03) and logit.std().item() == pytest.approx(0.8, abs=0.03)


class IdealCleanDenoiser(TREADTransformer2DModel):
    """E[x | z] for Gaussian data and z = (1 - t) x + t noise, as a network."""

    def forward(self, hidden_states, timestep, *args, **kwargs):
        t = timestep / 1000
        variance = (1 - t) ** 2 * STD**2 + t**2
        return ((MEAN + (1 - t) * STD**2 / variance * (hidden_states - (1 - t) * MEAN)),)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(shift=2.0), FlowMatchHeunDiscreteScheduler(), FlowSDEScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_ideal_network_samples_the_data_s_mean_and_variance(scheduler):
    model = IdealCleanDenoiser(num_layers=4, sample_size=64, in_channels=1, objective="jit", routes=None)
    pipe = TREADPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 1, 64, 64, generator=seeded(1))
    settings = {"num_inference_steps": 150, "output_type": "latent", "generator": seeded(2)}
    samples = pipe([0] * 4, latents=noise.clone(), **settings).images
    if not isinstance(scheduler, FlowSDEScheduler):  # the flow from N(0, 1) to N(MEAN, STD^2)
        torch.testing.assert_close(samples, MEAN + STD * noise, atol=0.03, rtol=0.03)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(STD, rel=0.03)


def test_the_pipeline_hands_the_scheduler_velocities_with_any_guidance(tmp_path):
    model, earlier = stirred(make_model()), make_model()
    torch.nn.init.normal_(earlier.proj_out.bias, generator=seeded(5))
    guider = SparseGuidance(guidance_scale=2.0, strong_ratio=0.0, weak_ratio=0.0, weak_checkpoint=True)
    pipe = TREADPipeline(model, JiTObjective(shift=1.5).scheduler(), guider=guider, guidance_transformer=earlier)
    latents, labels = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1, 7])

    def sampled(pipe, **settings):
        pipe.set_progress_bar_config(disable=True)
        settings |= {"num_inference_steps": 4, "output_type": "latent", "latents": latents.clone()}
        return pipe([1, 7], **settings).images

    def by_hand(strong, weak):
        """Euler's steps of the extrapolated velocity, in the paper's time."""
        scheduler = JiTObjective(shift=1.5).scheduler()
        scheduler.set_timesteps(4)
        z = latents.clone()
        for sigma, following in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False):
            clean = [predict(z, 1000 * sigma).sample for predict in (strong, weak)]
            v, weak_v = ((x - z) / max(sigma.item(), 0.05) for x in clean)
            z = z + (sigma - following) * (weak_v + 2.0 * (v - weak_v))
        return z

    with torch.no_grad():
        given = by_hand(lambda z, t: model(z, t, labels), lambda z, t: earlier(z, t, labels))
        plain = by_hand(lambda z, t: model(z, t, labels), lambda z, t: model(z, t))
    torch.testing.assert_close(sampled(pipe), given, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled(pipe, guidance_scale=2.0), plain, atol=1e-4, rtol=1e-4)

    # Saved, and with the code in the folder alone.
    pipe.save_pretrained(tmp_path / "saved")
    loaded = TREADPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.transformer.config.objective == "jit" and loaded.transformer.config.patch_bottleneck_dim == 3
    assert torch.equal(sampled(loaded), sampled(pipe))
    exported = export_for_hub(pipe, tmp_path / "hub")
    foreign = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    assert type(foreign).__module__.startswith("diffusers_modules.")
    torch.testing.assert_close(sampled(foreign), sampled(pipe))


def test_networks_and_schedulers_of_another_objective_are_refused():
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="for the objective 'flow', got .* with objective='jit'"):
        FlowMatchingObjective().loss(make_model(), images)
    with pytest.raises(ValueError, match="for the objective 'jit', got .* with objective='flow'"):
        JiTObjective().loss(make_model(objective="flow"), images)
    with pytest.raises(ValueError, match="objective 'jit', got EDMHeunScheduler"):
        TREADPipeline(make_model(), EDMHeunScheduler())
    with pytest.raises(ValueError, match="guidance_transformer with the transformer's objective"):
        flow = make_model(objective="flow")
        TREADPipeline(make_model(), JiTObjective().scheduler(), guidance_transformer=flow)


def test_terms_of_the_loss_go_with_it():
    model, images = make_model().train(), torch.rand(2, 1, 8, 8) * 2 - 1
    term = ReconstructionLoss.for_model(model)
    loss = JiTObjective().loss(model, images, terms=(term,), routing=RoutingCall(seed=1), generator=seeded())
    assert loss.isfinite().all()


def test_training_on_digits_lowers_the_loss():
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target)
    objective, model = JiTObjective(), make_model()

    def held_out():
        with torch.no_grad():
            losses = objective.loss(model.eval(), images[1500:], class_labels=labels[1500:], generator=seeded(9))
        return losses.mean().item()

    before, generator = held_out(), seeded(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(20):
        ids = torch.randint(1500, (16,), generator=generator)
        routing = RoutingCall(seed=step)
        loss = objective.loss(
            model.train(), images[ids], class_labels=labels[ids], generator=generator, routing=routing
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The network that says 0 has the data's second moment, weighted by 1 / max(t, 0.05)^2.
    assert held_out() < 0.7 * before
