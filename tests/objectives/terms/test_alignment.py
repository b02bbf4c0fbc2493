# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The alignment with a vision encoder against its formula in numpy, and what the encoder is shown."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread import FlowMatchingObjective, RoutingCall, TREADTransformer2DModel
from diffusers_tread.objectives import AlignmentLoss, DenoiserWithHeads, ForwardRecord
from diffusers_tread.objectives.terms.alignment import ConvProjector, normalize_features
from diffusers_tread.objectives.terms.vision_encoder import VisionEncoder


transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"image_size": 12, "patch_size": 4}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
ROUTES = [{"start": 1, "end": 2, "selection_ratio": 0.5}, {"start": 4, "end": 4, "selection_ratio": 0.25}]


def save(model, folder):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD, "size": 12}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=1))
    return save(model, tmp_path_factory.mktemp("dinov2"))


def make(dinov2, *, blocks=(0, 2, 4), settings=None, **config):
    """A model, its term, and the two as they are trained."""
    torch.manual_seed(1)
    model = TREADTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=8, in_channels=3, sample_size=8, num_classes=4,
        objective="flow", **{"routes": ROUTES} | config,
    ).train()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = {"projector_dim": 10} if settings is None else settings
    term = AlignmentLoss.for_model(model, encoder=dinov2, blocks=list(blocks), **settings)
    return model, term, DenoiserWithHeads(model, [term])


def normalised(images, size):
    """Images in [-1, 1] as an encoder gets them; resized by Pillow to (width, height)."""
    resized = [
        [np.array(PIL.Image.fromarray(channel).resize(size, PIL.Image.Resampling.BICUBIC)) for channel in image]
        for image in images.numpy()
    ]
    pixels = (torch.tensor(np.array(resized)) + 1) / 2
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def loss_of(denoiser, terms, *, images=True, step=0, enabled=None):
    """Of 8x12 images, 4x6 tokens."""
    latents = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    options = {"routing": RoutingCall(seed=3, enabled=enabled), "generator": torch.Generator().manual_seed(0)}
    options |= {"images": latents, "step": step} if images else {}
    return FlowMatchingObjective().loss(
        denoiser, latents, terms=terms, class_labels=torch.tensor([0, 4, 1]), **options
    )


def project(head, hidden):
    return head(hidden, columns=6) if isinstance(head, ConvProjector) else head(hidden)


def silu(x):
    """And its derivative."""
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def numpy_alignment(tokens, features, projector):
    """Of one sample: 1 - cos over its tokens, its derivatives by the projector's last bias and by tokens; float64."""
    (w1, b1), (w2, b2), (w3, b3) = [
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in projector[::2]
    ]
    losses, by_bias, by_token = [], [], []
    for token, feature in zip(tokens, features, strict=True):
        first, slope1 = silu(w1 @ token + b1)
        second, slope2 = silu(w2 @ first + b2)
        loss, slope = numpy_cosine(w3 @ second + b3, feature, len(tokens))
        losses.append(loss)
        by_bias.append(slope)
        by_token.append(w1.T @ (slope1 * (w2.T @ (slope2 * (w3.T @ by_bias[-1])))))
    return np.mean(losses), np.sum(by_bias, axis=0), np.array(by_token)


def numpy_cosine(z, feature, count):
    """1 - cos of one of `count` tokens, and the mean's derivative by z."""
    y, length = feature / np.linalg.norm(feature), np.linalg.norm(z)
    return 1 - z @ y / length, -(y - (z @ y) * z / length**2) / length / count


def numpy_conv_alignment(tokens, features, conv, columns):
    """Of one sample: the mean of 1 - cos over a grid, its derivatives by bias, weight and tokens; float64."""
    weight, bias = (one.detach().double().numpy() for one in (conv.weight, conv.bias))
    rows, losses = len(tokens) // columns, []
    by_bias, by_weight, by_token = np.zeros_like(bias), np.zeros_like(weight), np.zeros_like(tokens)
    for row, column in np.ndindex(rows, columns):
        seen = [  # the place in the kernel and the token, of what is inside
            ((i, j), (row + i - 1) * columns + column + j - 1)
            for i, j in np.ndindex(3, 3)
            if 0 <= row + i - 1 < rows and 0 <= column + j - 1 < columns
        ]
        z = bias + sum(weight[:, :, i, j] @ tokens[token] for (i, j), token in seen)
        loss, slope = numpy_cosine(z, features[row * columns + column], len(tokens))
        losses.append(loss)
        by_bias += slope
        for (i, j), token in seen:
            by_weight[:, :, i, j] += np.outer(slope, tokens[token])
            by_token[token] += weight[:, :, i, j].T @ slope
    return np.mean(losses), by_bias, by_weight, by_token


def gradient_by_tokens(term, block, output, latents):
    """Of the term itself, by the tokens after a block as they were."""
    tokens = {index: hidden.detach().requires_grad_() for index, hidden in output.hidden_states.items()}
    record = ForwardRecord(
        latents=latents, noisy=latents, timestep=torch.zeros(3), target=latents, prediction=latents,
        denoise=lambda prediction: prediction, conditions={}, kept_token_ids=output.kept_token_ids, images=latents,
        projected_states={index: project(term.heads[index], hidden) for index, hidden in tokens.items()},
    )  # fmt: skip
    return torch.autograd.grad(term(record).sum(), tokens[block])[0]


@pytest.mark.parametrize("enabled", [None, False])
def test_loss_and_gradient_equal_their_formula_dense_and_on_the_kept_tokens(dinov2, enabled):
    model, term, denoiser = make(dinov2)
    recorded = []
    denoiser.register_forward_hook(lambda module, args, output: recorded.append(output))
    plain = loss_of(model, [], enabled=enabled)
    loss = loss_of(denoiser, [term], enabled=enabled)
    loss.sum().backward()

    # The encoder on the clean images, resized to 4x6 patches of 4 pixels.
    latents = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    with torch.no_grad():
        encoder = transformers.Dinov2Model.from_pretrained(dinov2).eval()
        features = encoder(pixel_values=normalised(latents, (24, 16))).last_hidden_state
    features = features[:, 1:].double().numpy()

    (output,), expected = recorded, np.zeros(3)
    kept = [None, None] if enabled is False else output.kept_token_ids
    for block, route in ((0, None), (2, 0), (4, 1)):
        tokens = output.hidden_states[block].detach().double().numpy()
        ids = None if route is None else kept[route]
        assert tokens.shape[1] == (24 if ids is None else {0: 12, 1: 18}[route])
        gradients, by_tokens = [], gradient_by_tokens(term, block, output, latents)
        for sample in range(3):
            places = range(24) if ids is None else ids[sample].tolist()
            target = [features[sample, place] for place in places]
            one, gradient, by_token = numpy_alignment(tokens[sample], target, term.heads[block])
            expected[sample] += 0.5 * one / 3
            gradients.append(0.5 * gradient / 3)
            np.testing.assert_allclose(by_tokens[sample], 0.5 * by_token / 3, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(term.heads[block][4].bias.grad, np.sum(gradients, axis=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose((loss - plain).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("enabled", [None, False])
def test_a_convolution_sees_the_grid_dense_and_that_of_the_kept_rows(dinov2, enabled):
    settings = {"projector": "conv", "spatial_norm": 0.6}
    routes = [ROUTES[0] | {"unit": "row"}, ROUTES[1]]
    model, term, denoiser = make(dinov2, blocks=(0, 2), settings=settings, routes=routes)
    recorded, looked = [], []
    denoiser.register_forward_hook(lambda module, args, output: recorded.append(output))
    look = term.encoder.model.register_forward_hook(lambda module, args, output: looked.append(output))
    plain, loss = loss_of(model, [], enabled=enabled), loss_of(denoiser, [term], enabled=enabled)
    loss.sum().backward()
    look.remove()

    # iREPA's normalisation of the features, over all tokens.
    (output,), (teacher,) = recorded, looked
    features = teacher.last_hidden_state[:, 1:].double().numpy()
    features = features - 0.6 * features.mean(axis=1, keepdims=True)
    features = features / (features.std(axis=1, keepdims=True, ddof=1) + 1e-6)

    latents = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    kept, expected = None if enabled is False else output.kept_token_ids[0], np.zeros(3)
    for block in (0, 2):
        tokens, conv = output.hidden_states[block].detach().double().numpy(), term.heads[block].conv
        assert tokens.shape[1] == (24 if kept is None or block == 0 else 12)  # of 4 rows with 6 tokens
        by_tokens, by_bias, by_weight = gradient_by_tokens(term, block, output, latents), 0, 0
        for sample in range(3):
            places = slice(None) if kept is None or block == 0 else kept[sample].numpy()
            one, bias, weight, token = numpy_conv_alignment(tokens[sample], features[sample][places], conv, columns=6)
            expected[sample] += 0.25 * one
            by_bias, by_weight = by_bias + 0.25 * bias, by_weight + 0.25 * weight
            np.testing.assert_allclose(by_tokens[sample], 0.25 * token, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(conv.bias.grad, by_bias, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(conv.weight.grad, by_weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose((loss - plain).detach(), expected, rtol=1e-4, atol=1e-5)


def test_normalised_features_have_no_common_part_left_and_a_deviation_of_one():
    features = torch.randn(2, 24, 5) * torch.rand(5) + 3
    normal = normalize_features(features, gamma=1.0)
    torch.testing.assert_close(normal.mean(dim=1), torch.zeros(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(dim=1), torch.ones(2, 5), atol=1e-3, rtol=0)
    scaled = normalize_features(features, gamma=0.0)
    torch.testing.assert_close(scaled, features / features.std(dim=1, keepdim=True), atol=1e-3, rtol=0)


def test_stored_features_take_the_place_of_the_images(dinov2):
    model, term, denoiser = make(dinov2, settings={"projector_dim": 10, "spatial_norm": 1.0})
    latents = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    given = {"image_features": term.encoder(latents, (4, 6)).half()}
    options = {"routing": RoutingCall(seed=3), "class_labels": torch.tensor([0, 4, 1]), "terms": [term]}
    look, term.encoder.model = term.encoder.model, None
    loss = FlowMatchingObjective().loss(
        denoiser, latents, generator=torch.Generator().manual_seed(0), **options, **given
    )
    term.encoder.model = look
    torch.testing.assert_close(loss, loss_of(denoiser, [term]), atol=1e-3, rtol=1e-3)
    assert not torch.equal(loss, loss_of(denoiser, [term]))  # which is rounding
    wanted = term.stored_features
    assert wanted["patch_size"] == 2 and wanted["encoder"]["class_name"] == "Dinov2Model"
    assert wanted["encoder"] == VisionEncoder(look.bfloat16(), mean=MEAN, std=STD).identity()


def test_tokens_get_a_gradient_through_the_projector_and_the_encoder_none(dinov2):
    model, term, denoiser = make(dinov2, blocks=[2])
    without = torch.autograd.grad(loss_of(model, []).sum(), model.transformer_blocks[2].parameters())
    with_term = torch.autograd.grad(loss_of(denoiser, [term]).sum(), model.transformer_blocks[2].parameters())
    assert not any(torch.allclose(one, other) for one, other in zip(without, with_term, strict=True))
    assert not any(parameter.requires_grad for parameter in term.encoder.model.parameters())
    assert not term.encoder.model.training
    assert {id(parameter) for parameter in denoiser.parameters()} == {
        id(parameter) for module in (model, *term.heads.values()) for parameter in module.parameters()
    }


def test_after_its_last_step_nothing_is_added_and_the_projectors_still_have_gradients(dinov2):
    model, term, denoiser = make(dinov2, settings={"projector_dim": 10, "until_step": 2})
    plain = loss_of(model, [])
    assert (loss_of(denoiser, [term], step=1) - plain).min() > 0.01
    loss = loss_of(denoiser, [term], step=2)
    assert torch.equal(loss, plain)
    loss.sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())  # which DDP waits for
    assert not any(parameter.grad.any() for parameter in denoiser.heads.parameters())


# What the encoder sees.


def make_encoder(name):
    sizes = {"text_config": TEXT, "vision_config": SIZES}
    torch.manual_seed(0)
    return {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=1)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=1, num_register_tokens=3)
        ),
        "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=2)),
        "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(**sizes)),
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(**sizes, projection_dim=8)),
    }[name]()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3", "siglip", "clip"])
def test_the_features_are_the_patches_of_the_image_resized_to_the_grid(name, tmp_path):
    model = make_encoder(name)
    folder = save(model, tmp_path / name)
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = VisionEncoder.from_pretrained(folder)
    features = encoder(images, (4, 6))
    assert features.shape == (2, 24, 16) and features.dtype == torch.float32

    # The tokens that come first are no patches.
    pixels = normalised(images, (24, 16))
    vision, first = getattr(model.eval(), "vision_model", model), {"dinov2": 1, "registers": 4, "dinov3": 3, "clip": 1}
    options = {"interpolate_pos_encoding": True} if name in ("siglip", "clip") else {}
    expected = vision(pixel_values=pixels, **options).last_hidden_state[:, first.get(name, 0) :]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder(images[:, :1], (2, 2)), encoder(images[:, :1].expand(-1, 3, -1, -1), (2, 2)))  # grey


class OneSize(torch.nn.Module):
    """An encoder of 12x12 pixels in patches of 4: each feature is the mean of the patch; two tokens come first."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(patch_size=4, image_size=12, hidden_size=3)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        assert pixel_values.shape[2:] == (12, 12)
        patches = self.scale * torch.nn.functional.avg_pool2d(pixel_values, 4).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.new_full((len(patches), 2, 3), 9.0), patches], dim=1)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=tokens)


def test_an_encoder_of_one_size_sees_it_and_its_features_are_resized():
    encoder = VisionEncoder(OneSize(), mean=[0.5] * 3, std=[0.5] * 3)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    means = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5))  # B 3 rows columns
    torch.testing.assert_close(encoder(images, (3, 3)), means.flatten(2).transpose(1, 2))
    corners = encoder(images, (6, 6)).unflatten(1, (6, 6))[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, means[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].transpose(1, 2))


# Bad input.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks": [8]}, "Expected different blocks among 0 to 7 to align"),
        ({"blocks": [1, 1]}, "Expected different blocks among 0 to 7 to align"),
        ({"blocks": []}, "Expected different blocks among 0 to 7 to align"),
        ({"projector_dim": 0}, "Expected projector_dim >= 1"),
        ({"weight": -1.0}, "Expected weight to be a finite number >= 0"),
        ({"until_step": 0}, "Expected until_step >= 1"),
        ({"projector": "cnn"}, "Expected projector 'mlp' or 'conv'"),
        ({"projector": "conv"}, 'got 2 in the route 1 to 2. Align at a block outside.*projector "mlp"'),
        ({"projector": "conv", "blocks": [0], "projector_dim": 8}, "Expected no projector_dim"),
        ({"spatial_norm": 1.5}, r"Expected spatial_norm in \[0, 1\]"),
        ({"encoder": "no/such-encoder"}, "Expected a vision encoder with safetensors"),
    ],
)
def test_settings_out_of_range_are_refused(dinov2, changes, message):
    model, _, _ = make(dinov2)
    with pytest.raises(ValueError, match=message):
        AlignmentLoss.for_model(model, **{"encoder": dinov2, "blocks": [2]} | changes)


def test_what_has_no_tokens_patches_projectors_or_images_is_refused(dinov2, tmp_path):
    with pytest.raises(ValueError, match="Expected a denoiser of this package with patches.*got Linear"):
        AlignmentLoss.for_model(torch.nn.Linear(2, 2), encoder=dinov2, blocks=[0])
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    folder = save(transformers.ResNetModel(config), tmp_path)
    with pytest.raises(ValueError, match="in square patches, got ResNetModel"):
        VisionEncoder.from_pretrained(folder)
    model, term, denoiser = make(dinov2)
    with pytest.raises(ValueError, match="Expected a DenoiserWithHeads"):
        loss_of(model, [term])
    with pytest.raises(ValueError, match="Expected the images of the latents"):
        loss_of(denoiser, [term], images=False)
    with pytest.raises(ValueError, match=r"Expected one head at a block, got heads at \[0, 2, 4, 0, 2, 4\]"):
        DenoiserWithHeads(model, [term, term])
