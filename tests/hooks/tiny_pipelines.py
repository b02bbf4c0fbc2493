# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""SD3, Flux and PRX pipelines with their real tokenizers and text encoders, built small, with random weights."""

import json

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PRXPipeline,
    StableDiffusion3Pipeline,
)
from tiny_transformers import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder


def clip_tokenizer(folder):
    """A CLIP tokenizer whose vocabulary is the letters."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(97, 123)]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def t5_tokenizer():
    """A word-level tokenizer in T5's role."""
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "a", "square"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def clip_encoder(cls):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 54, "max_position_embeddings": 8, "projection_dim": 16}
    return cls(CLIPTextConfig(**sizes, bos_token_id=52, eos_token_id=53, pad_token_id=53))


def t5_encoder():
    return T5EncoderModel(T5Config(vocab_size=7, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae(cls=AutoencoderKL, latent_channels=4):
    settings = {"scaling_factor": 1.5, "shift_factor": 0.1} if cls is AutoencoderKL else {}
    return cls(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    )


def sd3_pipeline(folder):
    return StableDiffusion3Pipeline(
        transformer=make("SD3Transformer2DModel", joint_attention_dim=32, pooled_projection_dim=32),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(folder / "clip"),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(folder / "clip2"),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def flux_pipeline(folder):
    config = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True}
    return FluxPipeline(
        transformer=make("FluxTransformer2DModel", in_channels=16, num_layers=3, **config),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(folder / "clip"),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def t5_gemma_encoder():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 7}
    encoder = T5GemmaEncoder(T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=7).encoder)
    # Its saved config is read by transformers as it is, and by newer diffusers as one that has a part for the encoder:
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/prx/__init__.py
    encoder.config.encoder = sizes
    return encoder


def prx_pipeline(folder):
    """Without resolution bins: call it with `use_resolution_binning=False`."""
    return PRXPipeline(
        transformer=make("PRXTransformer2DModel", axes_dim=[4, 4], mlp_ratio=2.0, context_in_dim=32),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=t5_gemma_encoder(),
        tokenizer=t5_tokenizer(),
        default_sample_size=16,
    )


PIPELINES = {"sd3": sd3_pipeline, "flux": flux_pipeline, "prx": prx_pipeline}
