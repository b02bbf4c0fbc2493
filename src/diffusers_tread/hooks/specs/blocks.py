# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The specs of diffusers' transformer blocks: how each class is called."""

from collections.abc import Callable
from typing import Any

import torch

from .types import BlockSpec


def _adds_positions(block: torch.nn.Module, argument: Callable[[str], Any]) -> str | None:
    return None if getattr(block, "pos_embed", None) is None else "the block adds positions to its tokens"


def _slides_over_positions(block: torch.nn.Module, argument: Callable[[str], Any]) -> str | None:
    if block.self_attn.sliding_window is None or argument("attention_mask") is not None:
        return None
    return "its flash attention backend counts a sliding window in tokens; use another backend"


BLOCK_SPECS: dict[str, BlockSpec] = {
    # Image tokens alone in the stream, or with the text in a second stream; no table covers both.
    "BasicTransformerBlock": BlockSpec(tokens={"attention_mask": {2: 1, 3: 2}}, objection=_adds_positions),
    "JointTransformerBlock": BlockSpec(output=1),
    "AuraFlowJointTransformerBlock": BlockSpec(output=1),
    "CogView3PlusTransformerBlock": BlockSpec(),
    "CogView4TransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0}),
    "CogVideoXBlock": BlockSpec(tokens={"image_rotary_emb": 0}),
    "ConsisIDBlock": BlockSpec(tokens={"image_rotary_emb": 0}),
    "EasyAnimateTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0}),
    "GlmImageTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0}, must_be_none=("kv_cache",)),
    "HunyuanDiTBlock": BlockSpec(tokens={"image_rotary_emb": 0, "skip": 1}),
    "MochiTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0}),
    "PRXBlock": BlockSpec(tokens={"image_rotary_emb": 2}),
    "LuminaNextDiTBlock": BlockSpec(tokens={"image_rotary_emb": 1, "attention_mask": 1}),
    "QwenImageTransformerBlock": BlockSpec(
        output=1, tokens={"image_rotary_emb.0": 0, "modulate_index": 1}, newer=("modulate_index",)
    ),
    "NucleusMoEImageTransformerBlock": BlockSpec(
        tokens={"image_rotary_emb.0": 0, "attention_kwargs.attention_mask": 1}, text="last"
    ),
    "JoyImageTransformerBlock": BlockSpec(tokens={"image_rotary_emb.0": 0}),
    "JoyImageEditPlusTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 1, "attention_mask": 3}, text="last"),
    # Text in a second stream, before the image in the rotary table.
    "FluxTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "FluxSingleTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "BriaTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "BriaSingleTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "BriaFiboTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "ChromaTransformerBlock": BlockSpec(
        output=1, tokens={"image_rotary_emb": 0, "attention_mask": {2: 1, 4: (2, 3)}}, text="first"
    ),
    "Flux2TransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "Flux3ModeTransformerBlock": BlockSpec(tokens={"temb_mod": 1, "image_rotary_emb": 0}),
    "Flux3SingleTransformerBlock": BlockSpec(output=1, tokens={"temb_mod": 1, "image_rotary_emb": 0}, text="first"),
    "LongCatImageTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "LongCatImageSingleTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "OvisImageTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    "OvisImageSingleTransformerBlock": BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"),
    # Text in a second stream, after the image in the mask.
    "HunyuanVideoTransformerBlock": BlockSpec(tokens={"freqs_cis": 0, "attention_mask": 3}, text="last"),
    "HunyuanVideoSingleTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last"),
    "HunyuanVideoTokenReplaceTransformerBlock": BlockSpec(
        tokens={"freqs_cis": 0, "attention_mask": 3}, text="last", keep_first="num_tokens"
    ),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": BlockSpec(
        tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last", keep_first="num_tokens"
    ),
    "HunyuanVideo15TransformerBlock": BlockSpec(tokens={"freqs_cis": 0}),
    "HunyuanImageTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last"),
    "HunyuanImageSingleTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last"),
    "MotifVideoTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last"),
    "MotifVideoSingleTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="last"),
    "HiDreamBlock": BlockSpec(tokens={"image_rotary_emb": 1, "hidden_states_masks": 1}, text="last"),
    # One stream, [text, image].
    "AuraFlowSingleTransformerBlock": BlockSpec(text="first", joint=True),
    "BriaFiboSingleTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0}, text="first", joint=True),
    "ChromaSingleTransformerBlock": BlockSpec(
        tokens={"image_rotary_emb": 0, "attention_mask": {2: 1, 4: (2, 3)}}, text="first", joint=True
    ),
    "Flux2SingleTransformerBlock": BlockSpec(
        tokens={"image_rotary_emb": 0}, text="first", joint=True, must_be_none=("encoder_hidden_states",)
    ),
    "Krea2TransformerBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": 3}, text="first", joint=True),
    "OmniGenBlock": BlockSpec(tokens={"image_rotary_emb": 0, "attention_mask": {4: (2, 3)}}, text="first", joint=True),
    "QwenImage21TransformerBlock": BlockSpec(
        tokens={"rotary_emb": 0, "target_token_mask": 0, "key_valid": 1},
        text="first",
        joint=True,
        must_be_none=("attention_mask", "layer_cache"),
    ),
    # One stream, with the image first or where the model's window says.
    "HiDreamBlock/single_stream_blocks": BlockSpec(
        tokens={"image_rotary_emb": 1, "hidden_states_masks": 1}, text="last", joint=True
    ),
    "ErnieImageSharedAdaLNBlock": BlockSpec(
        hidden="x",
        tokens={"rotary_pos_emb": 1, "temb": 0, "attention_mask": 3},
        text="last",
        joint=True,
        sequence_first=True,
    ),
    "Ideogram4TransformerBlock": BlockSpec(
        tokens={"image_rotary_emb": 1, "attention_mask": (2, 3), "adaln_input": 1}, joint=True
    ),
    "Lumina2TransformerBlock": BlockSpec(tokens={"image_rotary_emb": 1, "attention_mask": 1}, joint=True),
    "ZImageTransformerBlock": BlockSpec(
        hidden="x",
        tokens={"freqs_cis": 1, "attn_mask": 1, "noise_mask": 1},
        text="last",
        joint=True,
        newer=("noise_mask",),
    ),
    "BriaFibo2TransformerBlock": BlockSpec(
        hidden="x",
        tokens={"freqs_cis": 1, "attn_mask": 1, "noise_mask": 1},
        joint=True,
        window_mask="noise_mask",
    ),
    "MiniMaxH3TransformerBlock": BlockSpec(
        tokens={"adaln_indices": 0, "rotary_emb": 0, "attention_mask": {4: (2, 3)}},
        joint=True,
        needs_shared_subset=True,
    ),
    # Convolutions over the grid, so only rows can be routed.
    "SanaTransformerBlock": BlockSpec(num_rows="height"),
    "SanaVideoTransformerBlock": BlockSpec(tokens={"rotary_emb": 1, "timestep": 1}, num_rows="height"),
    "SanaVideoMSCamCtrlBlock": BlockSpec(
        hidden="x",
        tokens={
            "rotary_emb": 2,
            "ucpe_ray_transforms.0": 1,
            "ucpe_ray_transforms.1": 1,
            "ucpe_ray_transforms.2": 1,
            "ucpe_ray_transforms.3": 2,
            "plucker_emb": 1,
        },
        num_rows="THW.1",
    ),
    # Video.
    "AllegroTransformerBlock": BlockSpec(tokens={"image_rotary_emb.1": 1, "attention_mask": 2}),
    "AnyFlowTransformerBlock": BlockSpec(
        tokens={"rotary_emb": 2, "temb": 1}, must_be_none=("attention_mask", "kv_cache")
    ),
    "CosmosTransformerBlock": BlockSpec(
        tokens={
            "image_rotary_emb": 0,
            "extra_pos_emb": 1,
            "embedded_timestep": {3: 1},
            "temb": {3: 1},
            "controlnet_residual": 1,
        },
        newer=("controlnet_residual",),
    ),
    "Kandinsky5TransformerDecoderBlock": BlockSpec(
        hidden="visual_embed", tokens={"rope": 1}, must_be_none=("sparse_params",)
    ),
    "Kandinsky6FusedTransformerDecoderBlock": BlockSpec(hidden="vis", tokens={"vis_rope": 0}),
    "LTXVideoTransformerBlock": BlockSpec(tokens={"image_rotary_emb": 1, "temb": 1}),
    "LTX2VideoTransformerBlock": BlockSpec(
        tokens={
            "video_rotary_emb": {3: 1, 4: 2},
            "ca_video_rotary_emb": {3: 1, 4: 2},
            "temb": 1,
            "temb_ca_scale_shift": 1,
            "temb_ca_gate": 1,
            "self_attention_mask": {2: 1, 3: (1, 2)},
            "a2v_cross_attention_mask": 1,
            "v2a_cross_attention_mask": 2,
        },
    ),
    "SanaWMLTX2RefinerTransformerBlock": BlockSpec(
        tokens={"video_rotary_emb": {3: 1, 4: 2}, "temb": 1}, must_be_none=("kv_cache",)
    ),
    "SkyReelsV2TransformerBlock": BlockSpec(
        tokens={"rotary_emb": 1, "temb": {4: 2}, "attention_mask": (2, 3)},
    ),
    "WanTransformerBlock": BlockSpec(tokens={"rotary_emb": 1, "temb": {4: 1}}),
    # Audio.
    "AceStepTransformerBlock": BlockSpec(
        tokens={"position_embeddings": 0, "attention_mask": (2, 3)}, objection=_slides_over_positions
    ),
    "AudioDiTBlock": BlockSpec(tokens={"mask": 1, "rope": 0}),
    "MiniMaxMusic3TransformerBlock": BlockSpec(tokens={"rotary_emb": 0}, text="first", joint=True),
    "StableAudioDiTBlock": BlockSpec(tokens={"rotary_embedding": 0, "attention_mask": 1}, text="first", joint=True),
    "StableAudio3DiTBlock": BlockSpec(tokens={"rope": 0, "local_seq": 1}, text="first", joint=True),
}


def register_block_spec(name: str, spec: BlockSpec) -> None:
    """Makes `apply_token_routing` accept blocks of the class `name` and of its subclasses."""
    BLOCK_SPECS[name] = spec
