# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loss of TREAD's first version against its formula, token by token in numpy, on a real model."""

import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusers_tread import (
    EDMObjective,
    FlowMatchingObjective,
    ReconstructionLoss,
    RoutingCall,
    TokenRoute,
    TREADTransformer2DModel,
    apply_token_routing,
)
from diffusers_tread.objectives import ForwardRecord


ROUTES = [{"start": 0, "end": 0, "selection_ratio": 0.25}, {"start": 1, "end": 2, "selection_ratio": 0.7}]
OBJECTIVES = [EDMObjective, FlowMatchingObjective]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(objective=EDMObjective, **changes):
    config = {
        "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 6, "in_channels": 3, "sample_size": 8,
        "num_classes": 4, "routes": ROUTES, "objective": objective.name,
    }  # fmt: skip
    model = TREADTransformer2DModel(**config | changes).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=seeded(1))
    return model


def batch(channels=3):
    return torch.randn(4, channels, 8, 12, generator=seeded(7)), torch.tensor([0, 4, 1, 2])


def loss_of(model, objective, weight, *, denoiser=None, **routing):
    """The loss with a reconstruction of this weight; the plain loss for None."""
    latents, labels = batch()
    terms = () if weight is None else (ReconstructionLoss.for_model(model, weight=weight),)
    routing = RoutingCall(**{"seed": 3} | routing)
    denoiser = model if denoiser is None else denoiser
    return objective().loss(denoiser, latents, class_labels=labels, generator=seeded(), routing=routing, terms=terms)


def recorded(model, objective, weight, *, denoiser=None):
    """The loss, and the model's output in the same forward."""
    outputs = []
    hook = model.register_forward_hook(lambda _, args, output: outputs.append(output))
    loss = loss_of(model, objective, weight, denoiser=denoiser)
    hook.remove()
    return loss, outputs[0].sample, outputs[0].kept_token_ids


def numpy_parts(objective, prediction):
    """Squared error, denoised and noisy latents in float64, from the papers: EDM's Table 1, or z = (1 - t) x + t n."""
    latents, generator = batch()[0], seeded()
    normal = torch.randn(len(latents), generator=generator).double().numpy()[:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator).double().numpy()
    x, output = latents.double().numpy(), prediction.detach().double().numpy()
    if objective is FlowMatchingObjective:
        t = 1 / (1 + np.exp(-normal))
        noisy = (1 - t) * x + t * noise
        return (output - (noise - x)) ** 2, noisy - t * output, noisy
    sigma, sigma_data = np.exp(-1.2 + 1.2 * normal), 0.5
    noisy, total = x + sigma * noise, sigma**2 + sigma_data**2
    denoised = sigma_data**2 / total * noisy + sigma * sigma_data / np.sqrt(total) * output
    return total / (sigma * sigma_data) ** 2 * (denoised - x) ** 2, denoised, noisy


def numpy_loss(error, denoised, noisy, kept_token_ids, *, patch, weight):
    columns = error.shape[3] // patch
    num_tokens = error.shape[2] // patch * columns
    losses = []
    for sample in range(len(error)):
        per_route = []
        for ids in kept_token_ids:
            kept, routed = [], []
            for token in range(num_tokens):
                row, column = token // columns * patch, token % columns * patch
                here = (sample, slice(None), slice(row, row + patch), slice(column, column + patch))
                if ids is None or token in ids[sample]:
                    kept.append(error[here].mean())
                else:
                    target = (noisy[here] - noisy[here].mean()) / np.sqrt(noisy[here].var(ddof=1) + 1e-6)
                    routed.append(((denoised[here] - target) ** 2).mean())
            per_route.append(np.mean(kept) + weight * (np.mean(routed) if routed else 0.0))
        losses.append(np.mean(per_route))
    return np.array(losses)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_equals_its_formula(objective, patch, weight):
    loss, prediction, kept = recorded(make_model(objective, patch_size=patch), objective, weight)
    expected = numpy_loss(*numpy_parts(objective, prediction), kept, patch=patch, weight=weight)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)
    plain = numpy_loss(*numpy_parts(objective, prediction), [None], patch=patch, weight=weight)
    assert np.abs(expected - plain).min() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_route_that_keeps_all_tokens_counts_with_the_plain_loss(objective):
    routes = [ROUTES[0] | {"selection_ratio": 0.0}, ROUTES[1]]
    loss, prediction, kept = recorded(make_model(objective, routes=routes), objective, 0.1)
    assert kept[0] is None and kept[1] is not None
    expected = numpy_loss(*numpy_parts(objective, prediction), kept, patch=2, weight=0.1)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_dense_forward_has_the_plain_loss(objective):
    model = make_model(objective)
    plain = loss_of(model, objective, None, enabled=False)
    assert torch.equal(loss_of(model, objective, 0.5, enabled=False), plain)


def test_two_terms_in_place_of_the_denoising_loss_are_refused():
    model, (latents, labels) = make_model(), batch()
    terms = [ReconstructionLoss.for_model(model)] * 2
    with pytest.raises(ValueError, match="Expected one term at most in the denoising loss's place"):
        EDMObjective().loss(model, latents, class_labels=labels, terms=terms)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_routed_tokens_have_a_gradient_only_with_a_reconstruction(objective):
    model = make_model(objective, routes=ROUTES[1:])
    for weight in (0.0, 0.1):
        loss, prediction, (ids,) = recorded(model, objective, weight)
        (gradient,) = torch.autograd.grad(loss.sum(), prediction)
        per_token = gradient.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum(dim=(1, 4, 5)).flatten(1)  # B N
        has_gradient = torch.zeros_like(per_token).scatter(1, ids, 1.0) > 0 if weight == 0.0 else per_token > -1
        assert torch.equal(per_token > 0, has_gradient)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_get_the_same_gradient_from_checkpointed_and_wrapped_models(objective, tmp_path):
    options = {"rejoin": "sum", "magnitude_mix": -0.3}
    model = make_model(objective, routes=[route | options for route in ROUTES])

    def gradients(denoiser):
        loss, *_ = recorded(model, objective, 0.1, denoiser=denoiser)
        model.zero_grad()
        loss.mean().backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(gradients(torch.compile(wrapped, backend="eager")), expected)
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(wrapped), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_perfect_reconstruction_leaves_the_denoising_error_alone():
    noisy, ids = torch.randn(2, 3, 4, 6, generator=seeded()), torch.tensor([[0, 3], [1, 5]])
    patches = noisy.reshape(2, 3, 2, 2, 3, 2)
    mean = patches.mean((1, 3, 5), keepdim=True)
    scale = ((patches - mean).square().sum((1, 3, 5), keepdim=True) / 11).sqrt()  # unbiased, of 12 values
    denoised = ((patches - mean) / scale).reshape(noisy.shape)
    nothing = torch.zeros_like(noisy)

    def loss(denoised, noisy):
        record = ForwardRecord(
            latents=nothing, noisy=noisy, timestep=torch.zeros(2), target=nothing, prediction=nothing,
            denoise=lambda prediction: denoised, conditions={}, kept_token_ids=[ids],
        )  # fmt: skip
        return ReconstructionLoss(patch_size=2, weight=1.0)(record)

    assert loss(denoised, noisy).max() < 1e-10
    # The target does not depend on the patch's brightness and contrast; an error elsewhere counts as it is.
    assert loss(denoised, 5 * noisy + 3).max() < 1e-10
    assert loss(denoised + 2, noisy).tolist() == pytest.approx([4.0, 4.0])


# Bad input.


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan, "0.1"])
def test_a_weight_outside_its_range_is_refused(weight):
    with pytest.raises(ValueError, match="Expected weight to be a finite number >= 0"):
        ReconstructionLoss(patch_size=2, weight=weight)


def routed_dit():
    dit = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=6, sample_size=8)
    apply_token_routing(dit, TokenRoute(start=1, end=2))
    return dit


@pytest.mark.parametrize(
    "make, message",
    [
        (routed_dit, "with patches and routes for the reconstruction loss, got DiTTransformer2DModel"),
        (lambda: make_model(routes=None), "Expected a denoiser of this package.*Give it routes"),
        (lambda: torch.nn.Linear(2, 2), "with patches and routes for the reconstruction loss, got Linear"),
    ],
)
def test_models_that_cannot_tell_their_routed_tokens_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss.for_model(make(), weight=0.0)


def test_a_patch_of_one_value_cannot_be_reconstructed_but_left_out():
    model = make_model(in_channels=1, patch_size=1)
    with pytest.raises(ValueError, match="Expected patches of several values.*got 1x1 of one channel"):
        ReconstructionLoss.for_model(model, weight=0.1)
    latents, labels = batch(1)
    terms = (ReconstructionLoss.for_model(model, weight=0.0),)
    assert EDMObjective().loss(model, latents, class_labels=labels, terms=terms).shape == (4,)
