# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from diffusers_tread.data import encode_images


def test_a_posterior_is_sampled_shifted_and_scaled():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.3, shift_factor=0.2).eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = encode_images(vae, images, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, (mean + (0.5 * logvar).exp() * noise - 0.2) * 0.3)


def test_autoencoders_without_a_posterior_encode_too():
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.5,
    ).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(encode_images(tiny, images), tiny.encode(images).latents * 0.5)

    deep = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41,
    ).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(encode_images(deep, images), deep.encode(images).latent * 0.41)
