# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Blocks and models that cannot be routed, and why."""

REFUSED_BLOCKS: dict[str, str] = {
    "TREADTransformerBlock": "routes by itself: give TREADTransformer2DModel its `routes`",
    "TREADMamba2DBlock": "routes by itself: give TREADMamba2DModel its `routes`",
    "TREADRWKV2DBlock": "routes by itself: give TREADRWKV2DModel its `routes`",
    "HeliosTransformerBlock": "splits the sequence at a position given as a number",
    "Kandinsky6SRTransformerBlock": "uses block-sparse attention, laid out by position",
    "WanAnimate2TransformerBlock": "uses key caches and attention masks laid out by position",
    "RFD4ProteinaTrunkLayer": "holds a state for each pair of tokens",
    "Cosmos3VLTextMoTDecoderLayer": "runs one packed sequence without a batch axis",
    "BasicTransformerBlockDreamLite": "is part of a UNet",
    "MiniMaxMusic3DepthDecoderBlock": "decodes codes one after the other and denoises nothing",
}

REFUSED_MODELS: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "it runs causal chunks of different patch sizes through key caches",
    "DualTransformer2DModel": "it is part of a UNet",
    "LatteTransformer3DModel": "it reshapes between space and time around every block",
    "PriorTransformer": "its stream holds conditions and a single token to be denoised",
    "T5FilmDecoder": "it decodes one spectrogram segment with blocks of T5",
    "Transformer2DModel": "it is part of a UNet",
    "TransformerTemporalModel": "it is part of a UNet",
}
