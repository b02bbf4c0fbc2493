# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What routing has to know about other people's transformer blocks: one line per class.

A spec says which argument holds the tokens, where they come out, and which other arguments have an entry per token.
Specs are keyed by class name and found through the MRO, because FSDP2 replaces a module's class by a subclass of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch


class Window(NamedTuple):
    """The routable tokens of a stream: `length` of them from `start` on. All others are always kept."""

    start: "int | torch.Tensor"
    """0-based; negative counts from the end of the stream; a tensor [B] gives each sample its own."""

    length: int


Axis = int | tuple[int, ...] | Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """How to give a block some of its tokens.

    Example:
        >>> from diffusers_tread import BlockSpec, register_block_spec
        >>> register_block_spec("MyBlock", BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"))
    """

    hidden: str = "hidden_states"
    """The argument that holds the routable tokens, [B, L, D]."""

    output: int = 0
    """Which element of the returned tuple holds them. Without meaning for blocks that return a tensor."""

    tokens: Mapping[str, Axis] = field(default_factory=dict)
    """The other arguments with an entry per token, and their token axis. Axis 0 means without a batch axis. A tuple
    names several axes (a mask [B, 1, L, L]: (2, 3)); a mapping gives the axis by number of dimensions, and leaves
    other ranks alone (a modulation [B, L, 6, D] that may also be [B, 6, D]: {4: 1}). "name.0" or "name.key" reaches
    into a tuple or dict; else all tensors inside count. Axes of length 1 broadcast and stay."""

    text: Literal["first", "last"] | None = None
    """Where the text lies in arrays that cover text and image. None: no argument covers both."""

    joint: bool = False
    """Whether the block's own stream holds text and image."""

    sequence_first: bool = False
    """Whether the stream is [L, B, D]. Token axis 0 of other arguments then means [L, B, ...] too."""

    keep_first: str | None = None
    """An integer argument: that many tokens at the start of the stream are conditions and never routed."""

    window_mask: str | None = None
    """An argument [B, L] that is 1 on the routable tokens, which are contiguous."""

    must_be_none: tuple[str, ...] = ()
    """Arguments that address tokens by position. The block cannot be routed when they are given."""

    objection: Callable[[torch.nn.Module, Callable[[str], Any]], str | None] | None = None
    """From the block and a function that gives its arguments by name, why this call cannot be routed, or None."""

    newer: tuple[str, ...] = ()
    """Arguments that the block does not have in the oldest supported diffusers."""

    needs_shared_subset: bool = False
    """Whether an argument without a batch axis is used as an index, so that all samples must keep the same tokens."""

    @cached_property
    def gathers(self) -> tuple[tuple[str, tuple[str, ...], Axis], ...]:
        """(argument, path inside it, axis) for each entry of `tokens`."""
        return tuple((key.split(".")[0], tuple(key.split(".")[1:]), axis) for key, axis in self.tokens.items())

    @property
    def argument_names(self) -> set[str]:
        """The arguments that the block must have."""
        optional = [name for name in (self.keep_first, self.window_mask) if name is not None]
        named = {self.hidden, *optional, *self.must_be_none, *(name for name, _, _ in self.gathers)}
        return named - set(self.newer)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the blocks alone do not tell."""

    stacks: tuple[str, ...] | None = None
    """The main stacks, in the order they run. None: those attributes of `MAIN_STACKS` that the model has."""

    window: Callable[[torch.nn.Module, Mapping[str, Any]], Window | None] | None = None
    """From the model and the arguments of its forward, where the routable tokens lie in the stream of its blocks."""

    must_be_none: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the model's forward that routing does not go with, and why."""


MAIN_STACKS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "visual_transformer_blocks",
    "blocks",
    "layers",
    "single_transformer_blocks",
    "single_stream_blocks",
)


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
    # One stream, the image first or where the model says.
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

REFUSED_BLOCKS: dict[str, str] = {
    "TREADTransformerBlock": "routes by itself: give TREADTransformer2DModel its `routes`",
    "SanaTransformerBlock": "convolves over the grid of all tokens in its feed-forward layer",
    "SanaVideoTransformerBlock": "convolves over the grid of all tokens in its feed-forward layer",
    "SanaVideoMSCamCtrlBlock": "convolves over the grid of all tokens",
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


def register_block_spec(name: str, spec: BlockSpec) -> None:
    """Makes `apply_token_routing` accept blocks of the class called `name`, or of its subclasses."""
    BLOCK_SPECS[name] = spec


def find_by_class(table: Mapping[str, Any], module: torch.nn.Module, *, stack: str = "") -> Any:
    """The entry for the nearest class of the module's MRO, one for this stack ("Class/stack") before a general one."""
    for cls in type(module).__mro__:
        for name in (f"{cls.__name__}/{stack}", cls.__name__):
            if name in table:
                return table[name]
    return None
