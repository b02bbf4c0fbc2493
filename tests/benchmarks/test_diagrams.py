# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The diagrams show what the forwards did, and nothing else."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_tread import RoutingCall, TREADPipeline, TREADTransformer2DModel, get_token_router


pytest.importorskip("matplotlib")

import diagrams_draw  # noqa: E402
import diagrams_forwards  # noqa: E402


@pytest.fixture(scope="module")
def model():
    """Of 12 blocks and 16 tokens, whose every block does something."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 12, "patch_size": 2, "sample_size": 8}
    model = TREADTransformer2DModel(**size, in_channels=3, num_classes=2, objective="flow").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def test_the_cells_left_blank_are_those_of_the_routed_tokens_in_the_route(model):
    forward = diagrams_forwards.routed_forward(model, torch.zeros(3, 8, 8), 1, time=0.3, seed=5)
    plan = get_token_router(model).plan(torch.zeros(1, 16, 8), training=False, call=RoutingCall(enabled=True, seed=5))
    routed = set(range(16)) - set(plan[0][0].tolist())
    assert len(routed) == 8
    skipped = {(token, block) for token in routed for block in range(2, 9)}
    assert set(map(tuple, forward.changes.isnan().nonzero().tolist())) == skipped

    # The picture, which follows a row of the image.
    (axes,) = diagrams_draw.draw_routing(forward).axes
    cells = {tuple(map(int, patch.get_gid().split("/"))) for patch in axes.patches if patch.get_gid()}
    row = {token for token, _ in cells}
    assert len(row) == 4 and len(row & routed) in (1, 2, 3) and max(row) - min(row) == 3
    assert cells == {(token, block) for token in row for block in range(12)} - skipped


def test_a_change_is_the_difference_of_the_tokens_after_two_blocks(model):
    image = torch.linspace(-1, 1, 192).view(3, 8, 8)
    forward = diagrams_forwards.routed_forward(model, image, 1, time=0.3, seed=5)
    options = {"class_labels": torch.tensor([1]), "routing": RoutingCall(enabled=True, seed=5)}
    output = model(forward.noisy[None], torch.tensor([300.0]), **options, hidden_states_at=(0, 1, 4, 5))
    after = {block: tokens[0] for block, tokens in output.hidden_states.items()}
    torch.testing.assert_close(forward.changes[:, 1], (after[1] - after[0]).norm(dim=-1))
    torch.testing.assert_close(forward.changes[forward.kept, 5], (after[5] - after[4]).norm(dim=-1))


def test_a_guided_step_is_that_of_the_pipeline(model):
    pipeline = TREADPipeline(model, FlowMatchEulerDiscreteScheduler())
    step = diagrams_forwards.guided_step(pipeline, 1, guidance_scale=3.0, step=1, num_steps=3, seed=0)
    assert [len(kept) for kept in step.kept] == [13, 4] and step.shares_prefix and step.num_tokens == 16
    strong, weak = step.clean
    assert (strong - weak).abs().max() > 1e-3
    torch.testing.assert_close(step.guided, weak + 3 * (strong - weak))
    diagrams_draw.draw_guidance(step)
    assert not model._forward_hooks  # the model is as it was
