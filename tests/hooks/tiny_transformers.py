# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A tiny random model and inputs for every transformer of diffusers that can be routed.

All parameters are random, so that no gate is zero, and masks have zeros in them. Widths are 2 heads of 8 channels,
most models have 16 image tokens and 5 text tokens, and 8 blocks, which are routed from 1 to 4.

The table below has a row for each, which says what is particular to it, on top of what the models share.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding


@dataclass
class Case:
    """One model with its inputs."""

    model: torch.nn.Module
    inputs: dict[str, Any]
    starts: dict[int, Any] = field(default_factory=dict)
    """By the length of a block's stream, where the image tokens start in it (per sample, if a list). Not given: 0."""
    num_tokens: int = 16
    """Number of routable tokens."""
    unit: str = "token"
    """What can be routed: "row" where the blocks convolve over the grid."""
    shared: bool = False
    """Whether the model needs one subset for all samples."""
    batch_axes: dict[str, int | None] = field(default_factory=dict)
    """The axis of samples in the inputs where it is not the first; None where the samples share the input."""

    def sample(self, index: int) -> dict[str, Any]:
        """The inputs of one sample alone."""
        axes = dict.fromkeys(self.inputs, 0) | self.batch_axes
        return {name: _part(value, index, axes[name]) for name, value in self.inputs.items()}


def _part(value: Any, index: int, axis: int | None) -> Any:
    """One sample's part of what has two samples: a tensor, a list with an entry per sample, or tensors in a list."""
    if axis is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.narrow(axis, index, 1) if value.ndim > axis and value.shape[axis] == 2 else value
    if isinstance(value, list) and len(value) == 2:
        return value[index : index + 1]
    if isinstance(value, list | tuple):
        return type(value)(_part(entry, index, axis) for entry in value)
    return value


@dataclass
class Row:
    """What `row` was given."""

    inputs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


_ROWS: dict[str, Row] = {}


def row(
    name: str,
    inputs: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    *,
    needs: str | None = None,
    **fields: Any,
) -> None:
    """Adds a row to the table if this diffusers has the class, and its constructor the argument `needs`.

    `inputs` go to the forward; functions among them are called at each build, in their order. `config` goes to the
    constructor, which gets the rest from `TINY`. `fields` are those of `Case`.

    "Class-variant" is another configuration of the same class: its row says what it changes or adds.
    """
    class_name, _, variant = name.partition("-")
    model_class = getattr(diffusers, class_name, None)
    if model_class is not None and (needs is None or needs in signature(model_class.__init__).parameters):
        base = _ROWS[class_name] if variant else Row()
        _ROWS[name] = Row(base.inputs | (inputs or {}), base.config | (config or {}), base.fields | fields)


def names() -> list[str]:
    return list(_ROWS)


def classes() -> list[str]:
    """The names that are no variants."""
    return [name for name in names() if "-" not in name]


def row_of(name: str) -> Row:
    """What the table says of a model."""
    return _ROWS[name]


def build(name: str) -> Case:
    torch.manual_seed(1)
    wanted = _ROWS[name]
    model = make(name.split("-")[0], **wanted.config)
    inputs = _drawn(wanted.inputs)
    return Case(randomise(model).eval(), inputs, **wanted.fields)


def make(name: str, **config: Any) -> torch.nn.Module:
    """A model with `config` and, where that is silent, `TINY`, except that what is None by default stays None."""
    model_class = getattr(diffusers, name)
    parameters = signature(model_class.__init__).parameters
    tiny = {key: value for key, value in TINY.items() if key in parameters and parameters[key].default is not None}
    model = model_class(**(tiny | config))
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # it replaces labels at random in training
    return model


def _drawn(inputs: Any) -> Any:
    """A nest of inputs with its functions called."""
    if isinstance(inputs, dict):
        return {name: _drawn(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_drawn(value) for value in inputs)
    return inputs() if callable(inputs) else inputs


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Gives all parameters random values, the zero-initialised gates too."""
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else max(1, parameter.shape[1:].numel()) ** -0.5
        parameter.normal_(0.0, scale)
    return model


# ------------------------------------------------------------------------------------------ what the models share


# By the names of the constructors' arguments.
TINY = dict(
    # heads and widths
    num_attention_heads=2, num_heads=2, n_heads=2, num_key_value_heads=1, attention_head_dim=8,
    in_channels=4, out_channels=4, in_visual_dim=4, out_visual_dim=4,
    hidden_size=16, dim=16, model_dim=16, cross_attention_dim=16, caption_projection_dim=16,
    ffn_dim=16, ff_dim=16, intermediate_size=16, multiple_of=16,
    # depth; models with single blocks have three others before them
    num_layers=8, n_layers=8, depth=8, num_visual_blocks=8, num_single_layers=5,
    num_refiner_layers=1, n_refiner_layers=1, num_text_blocks=1,
    # sizes and positions
    sample_size=8, pos_embed_max_size=8, sample_height=4, sample_width=4, sample_frames=13, max_text_seq_length=5,
    rope_max_seq_len=32, axes_dims_rope=(2, 2, 4), rope_axes_dim=(2, 2, 4), rope_dim_list=[2, 2, 4],
    axes_dims=(4, 2, 2), use_rotary_positional_embeddings=True,
    # text, times and other conditions
    text_embed_dim=12, joint_attention_dim=12, text_dim=12, caption_channels=12, cap_feat_dim=12, context_in_dim=12,
    in_text_dim=12, in_text_dim2=6, pooled_projection_dim=6, image_embed_dim=6, condition_dim=4,
    freq_dim=8, time_dim=8, time_embed_dim=8,
    # sound beside a video
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
)  # fmt: skip


def normal(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def steps(*shape: int) -> Callable[[], torch.Tensor]:
    """Timesteps that differ within a sample."""
    return lambda: 1000 * torch.rand(shape)


TIME = torch.tensor([0.3, 0.7])
STEP = torch.tensor([300.0, 700.0])
AT_TIME, AT_STEP = {"timestep": TIME}, {"timestep": STEP}

IMAGE = {"hidden_states": normal(2, 4, 8, 8)}
GRID = {"hidden_states": normal(2, 4, 4, 4)}
TOKENS = {"hidden_states": normal(2, 16, 4)}
VIDEO = {"hidden_states": normal(2, 4, 4, 4, 4)}
VIDEO_SIZE = {"num_frames": 4, "height": 2, "width": 2}
AUDIO = {"hidden_states": normal(2, 4, 16)}

TEXT = {"encoder_hidden_states": normal(2, 5, 12)}
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
OTHER_TEXT_MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
MASK, BOOL_MASK = {"encoder_attention_mask": TEXT_MASK}, {"encoder_attention_mask": TEXT_MASK.bool()}
POOLED = {"pooled_projections": normal(2, 6)}
ROTARY = {"image_rotary_emb": (normal(16, 8), normal(16, 8))}
SIZES = {"target_size": torch.tensor([[8.0, 8.0], [9.0, 7.0]]), "crop_coords": torch.zeros(2, 2)}

IMAGE_IDS = torch.stack([torch.zeros(16), torch.arange(16.0) // 4, torch.arange(16.0) % 4], dim=1)
IDS = {"img_ids": IMAGE_IDS, "txt_ids": torch.zeros(5, 3)}
IDS_OF_4_AXES = {
    "img_ids": torch.cat([IMAGE_IDS, torch.zeros(16, 1)], dim=1),
    "txt_ids": torch.cat([torch.zeros(5, 3), torch.arange(5.0).unsqueeze(1)], dim=1),
}


# ---------------------------------------------------------------------------------------------------------- images

row(
    "DiTTransformer2DModel",
    IMAGE | {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 4])},
    dict(num_embeds_ada_norm=10),  # the number of classes
)
row(
    "PixArtTransformer2DModel",
    IMAGE | TEXT | AT_STEP | MASK | {
        "attention_mask": torch.tensor([[1] * 3 + [0] * 3 + [1] * 10, [1] * 16]).float(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    dict(caption_channels=12, use_additional_conditions=False),
)  # fmt: skip
row("SD3Transformer2DModel", IMAGE | TEXT | POOLED | AT_STEP)
row("SD3Transformer2DModel-3.5", config=dict(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"))
row(
    "AuraFlowTransformer2DModel",
    IMAGE | TEXT | AT_TIME,
    dict(num_mmdit_layers=3, num_single_dit_layers=5, pos_embed_max_size=16),
    starts={16 + 8 + 5: 8 + 5},  # 8 register tokens
)

COGVIEW = IMAGE | TEXT | AT_STEP | SIZES | {"original_size": SIZES["target_size"]}
row("CogView3PlusTransformer2DModel", COGVIEW, dict(time_embed_dim=16))
row("CogView4Transformer2DModel", COGVIEW, dict(time_embed_dim=16, rope_axes_dim=(8, 8)))
row(
    "GlmImageTransformer2DModel",
    IMAGE | TEXT | AT_STEP | SIZES | {
        "prior_token_id": lambda: torch.randint(0, 20, (2, 16)),
        "prior_token_drop": torch.tensor([False, False]),
    },
    dict(time_embed_dim=16, prior_vq_quantizer_codebook_size=20),
)  # fmt: skip

FLUX = TOKENS | TEXT | AT_TIME | IDS
row("FluxTransformer2DModel", FLUX | POOLED, dict(num_layers=3))
row(
    "ChromaTransformer2DModel",
    FLUX | {"attention_mask": torch.cat([TEXT_MASK, torch.ones(2, 16)], dim=1)},
    dict(num_layers=3, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
    starts={21: 5},
)
row("BriaTransformer2DModel", FLUX, dict(num_layers=3))
row(
    "BriaFiboTransformer2DModel",
    FLUX | {"text_encoder_layers": [normal(2, 5, 6)] * 8},
    dict(num_layers=3, text_encoder_dim=6),
    starts={21: 5},
)
row("OvisImageTransformer2DModel", FLUX, dict(num_layers=3))
row("LongCatImageTransformer2DModel", FLUX, dict(num_layers=3, pooled_projection_dim=12))
row(
    "Flux2Transformer2DModel",
    FLUX | IDS_OF_4_AXES | {"guidance": torch.tensor([3.5, 4.0])},
    dict(num_layers=3, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=8),
    starts={21: 5},
)
row(
    "Flux3Transformer2DModel",
    FLUX | IDS_OF_4_AXES,
    dict(num_layers=3, cond_in_channels=4, timestep_channels=8, axes_dims_rope=(2, 2, 2, 2)),
)
row(
    "Flux3Transformer2DModel-references",
    {"image_cond_hidden_states": normal(2, 6, 4), "image_cond_ids": lambda: torch.randint(0, 9, (6, 4)).float()},
)

QWEN = TOKENS | TEXT | AT_TIME | {"encoder_hidden_states_mask": TEXT_MASK, "img_shapes": [[(1, 4, 4)]] * 2}
if "txt_seq_lens" in signature(diffusers.QwenImageTransformer2DModel.forward).parameters:  # until diffusers 0.36
    QWEN["txt_seq_lens"] = [5, 5]
row("QwenImageTransformer2DModel", QWEN)
row(
    "QwenImageTransformer2DModel-edit",
    {"hidden_states": normal(2, 22, 4), "img_shapes": [[(1, 4, 4), (1, 2, 3)]] * 2},
    dict(zero_cond_t=True),
    needs="zero_cond_t",
)
row(
    "QwenImage21Transformer2DModel",
    TOKENS | AT_TIME | {
        # Seven text slots, then four slots of four tokens each for the 4x4 target.
        "encoder_hidden_states": normal(2, 7, 12),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_mask": torch.tensor([[False] * 7 + [True] * 4] * 2),
    },
    starts={23: 7},
)  # fmt: skip
row(
    "NucleusMoEImageTransformer2DModel",
    TOKENS | TEXT | AT_TIME | {"encoder_hidden_states_mask": TEXT_MASK.bool(), "img_shapes": [(1, 4, 4)] * 2},
    dict(out_channels=4, num_experts=2, moe_intermediate_dim=8, capacity_factors=[1.0] * 8),
)
row(
    "PRXTransformer2DModel",
    IMAGE | TEXT | AT_TIME | {"attention_mask": TEXT_MASK.bool()},
    dict(axes_dim=[4, 4], mlp_ratio=2.0),
)
row(
    "HunyuanDiT2DModel",
    IMAGE | TEXT | AT_STEP | {
        "text_embedding_mask": TEXT_MASK,
        "encoder_hidden_states_t5": normal(2, 3, 16),
        "text_embedding_mask_t5": OTHER_TEXT_MASK,
    } | ROTARY,
    dict(
        in_channels=4, patch_size=2,
        num_layers=12,  # the routed blocks 7 and 8 take skip connections
        cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5, text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    ),
)  # fmt: skip
row(
    "LuminaNextDiT2DModel",
    {"image_rotary_emb": lambda: torch.polar(torch.ones(8, 8, 4), torch.randn(8, 8, 4))}
    | IMAGE | TEXT | AT_TIME | {"encoder_mask": TEXT_MASK, "cross_attention_kwargs": {}},
    dict(num_kv_heads=1, cross_attention_dim=12),
)  # fmt: skip
row(
    "Lumina2Transformer2DModel",
    IMAGE | TEXT | AT_TIME | MASK,
    dict(num_kv_heads=1, axes_dim_rope=(4, 2, 2), axes_lens=(20, 8, 8)),
    starts={20: [4, 3]},
)
row(
    "ZImageTransformer2DModel",
    {"x": [normal(4, 1, 8, 8), normal(4, 1, 8, 8)], "t": TIME, "cap_feats": [normal(5, 12), normal(3, 12)]},
    dict(n_kv_heads=2, axes_dims=[4, 2, 2], axes_lens=[128, 16, 16]),
)


def _fibo2_text(*lengths: int) -> dict[str, Any]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"encoder_hidden_states": normal(2, 3, max(lengths), 12), "encoder_attention_mask": mask}


row(
    "BriaFibo2Transformer2DModel",
    IMAGE | AT_TIME | _fibo2_text(400, 400),
    dict(
        injection_layer_ids=(2, 4), perceiver_num_layers=1, axes_lens=(2048, 64, 64),
        min_num_gist_tokens=16, max_num_gist_tokens=32, gist_step=16,
    ),
    starts={48: 32},
)  # fmt: skip
row("BriaFibo2Transformer2DModel-uneven", _fibo2_text(2048, 256), starts={})
row(
    "Krea2Transformer2DModel",
    TOKENS | AT_TIME | BOOL_MASK | {
        "encoder_hidden_states": normal(2, 5, 2, 12),
        "position_ids": torch.cat([torch.zeros(5, 3), IMAGE_IDS]),
    },
    dict(
        timestep_embed_dim=8, axes_dims_rope=(4, 2, 2),
        num_text_layers=2, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, text_hidden_dim=12,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
    ),
    starts={21: 5},
)  # fmt: skip
row(
    "Ideogram4Transformer2DModel",
    {
        "hidden_states": normal(2, 21, 4),
        "encoder_hidden_states": normal(2, 21, 12),
        "position_ids": torch.cat([torch.arange(5.0).view(5, 1).expand(5, 3), IMAGE_IDS + 5]).long().repeat(2, 1, 1),
        # Padding before the text, so that the image starts at 5 in both samples' packed sequences.
        "segment_ids": torch.tensor([[1] * 21, [-1] * 2 + [1] * 19]),
        "indicator": torch.tensor([[3] * 5 + [2] * 16, [0] * 2 + [3] * 3 + [2] * 16]),
    } | AT_TIME,
    dict(attention_head_dim=16, adaln_dim=8, llm_features_dim=12, mrope_section=(4, 2, 2)),
    starts={21: 5},
)  # fmt: skip


def _omnigen_mask() -> torch.Tensor:
    """Of five text tokens, two of them padding in the second sample, the time's token and the image's."""
    mask = torch.ones(2, 22, 22)
    mask[:, :6, :6] = torch.ones(6, 6).tril()
    mask[:, :6, 6:] = 0
    mask[1, :, :2] = 0
    mask[1, :2, :2] = torch.eye(2)
    return mask


row(
    "OmniGenTransformer2DModel",
    IMAGE | AT_TIME | {
        "input_ids": lambda: torch.randint(0, 50, (2, 5)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": _omnigen_mask(),
        "position_ids": torch.arange(22).expand(2, -1),
    },
    dict(
        num_attention_heads=4, num_key_value_heads=4, hidden_size=32, intermediate_size=32,
        pad_token_id=0, vocab_size=50, time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    ),
    starts={22: 6},
)  # fmt: skip
row(
    "HiDreamImageTransformer2DModel",
    IMAGE | {
        "timesteps": STEP,
        "encoder_hidden_states_t5": normal(2, 3, 12),
        "encoder_hidden_states_llama3": normal(1, 2, 5, 10),
        "pooled_embeds": normal(2, 6),
    },
    dict(
        patch_size=2, out_channels=4, num_layers=3, caption_channels=[12, 10], text_emb_dim=6,
        num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16),
        llama_layers=[0] * 8, force_inference_output=True,
    ),
    batch_axes={"encoder_hidden_states_llama3": 1},
)  # fmt: skip
row(
    "ErnieImageTransformer2DModel",
    GRID | AT_STEP | {"text_bth": normal(2, 5, 12), "text_lens": torch.tensor([4, 3])},
    dict(ffn_hidden_size=16, text_in_dim=12, rope_axes_dim=(4, 2, 2)),
)
row("HunyuanImageTransformer2DModel", GRID | TEXT | AT_STEP | MASK, dict(num_layers=3, rope_axes_dim=(4, 4)))
row("JoyImageEditTransformer3DModel", {"hidden_states": normal(2, 2, 4, 1, 8, 8)} | TEXT | AT_STEP)
row(
    "JoyImageEditPlusTransformer3DModel",
    {"hidden_states": normal(2, 24, 4, 1, 2, 2)} | TEXT | AT_STEP | {
        "encoder_hidden_states_mask": TEXT_MASK.float(),
        "shape_list": [[(1, 4, 4), (1, 2, 4)], [(1, 4, 4), (1, 2, 2)]],
    },
)  # fmt: skip
SANA = TEXT | AT_STEP | MASK
row(
    "SanaTransformer2DModel",
    {"hidden_states": normal(2, 4, 6, 4)} | SANA,
    dict(num_cross_attention_heads=2, cross_attention_head_dim=8, patch_size=1),
    num_tokens=24,
    unit="row",
)


# ----------------------------------------------------------------------------------------------------------- video


row("CogVideoXTransformer3DModel", VIDEO | TEXT | AT_STEP | ROTARY)
row(
    "ConsisIDTransformer3DModel",
    VIDEO | TEXT | AT_STEP | ROTARY | {"id_cond": normal(2, 6), "id_vit_hidden": [normal(2, 3, 6)] * 5},
    dict(
        is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=4, cross_attn_num_heads=2,
        LFE_id_dim=6, LFE_vit_dim=6, LFE_depth=5, LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2,
        LFE_num_querie=3, LFE_output_dim=10,
    ),
)  # fmt: skip
row(
    "EasyAnimateTransformer3DModel",
    VIDEO | TEXT | AT_STEP,
    dict(in_channels=4, out_channels=4, attention_head_dim=16, patch_size=2),
)

HUNYUAN_VIDEO = VIDEO | TEXT | AT_STEP | MASK | POOLED
row("HunyuanVideoTransformer3DModel", HUNYUAN_VIDEO, dict(num_layers=3, guidance_embeds=False))
row(
    "HunyuanVideoTransformer3DModel-token_replace",
    config=dict(image_condition_type="token_replace"),
    starts={16: 4},
    num_tokens=12,
)
row(
    "HunyuanVideoFramepackTransformer3DModel",
    HUNYUAN_VIDEO | {
        "image_embeds": normal(2, 3, 6),
        "indices_latents": torch.arange(4),
        "latents_clean": normal(2, 4, 2, 4, 4),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": normal(2, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": normal(2, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    },
    dict(num_layers=3, guidance_embeds=False, has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True),
    starts={26: 10},  # ten tokens of history
    batch_axes={"indices_latents_clean": None, "indices_latents_history_2x": None},
)  # fmt: skip
row(
    "HunyuanVideo15Transformer3DModel",
    {"hidden_states": normal(2, 4, 1, 4, 4)} | TEXT | AT_STEP | MASK | {
        "encoder_hidden_states_2": normal(2, 3, 10),
        "encoder_attention_mask_2": OTHER_TEXT_MASK,
        "image_embeds": normal(2, 4, 6),
    },
    dict(text_embed_2_dim=10),
)  # fmt: skip
row(
    "MotifVideoTransformer3DModel",
    VIDEO | TEXT | AT_STEP | MASK | {"image_embeds": normal(2, 3, 6)},
    dict(num_layers=2, num_single_layers=6, num_decoder_layers=0, image_embed_dim=6),
)
row("MotifVideoTransformer3DModel-decoder", config=dict(num_decoder_layers=4))  # 4 to 7, of which 4 is routed
row(
    "MochiTransformer3DModel",
    VIDEO | {"encoder_hidden_states": normal(2, 5, 16)} | AT_STEP | BOOL_MASK,
    dict(pooled_projection_dim=8, text_embed_dim=16, time_embed_dim=4, max_sequence_length=5),
)

WAN = VIDEO | TEXT | AT_STEP
row("WanTransformer3DModel", WAN, dict(attention_head_dim=12))
row("WanTransformer3DModel-per_token_time", {"timestep": steps(2, 16)})
row("ChronoEditTransformer3DModel", WAN, dict(attention_head_dim=12, rope_temporal_skip_len=4))
row("SkyReelsV2Transformer3DModel", WAN, dict(attention_head_dim=12))
row(
    "SkyReelsV2Transformer3DModel-forcing",
    {"timestep": steps(2, 4), "enable_diffusion_forcing": True},
    dict(num_frame_per_block=2),
)
row(
    "WanVACETransformer3DModel",
    WAN | {"control_hidden_states": normal(2, 6, 4, 4, 4)},
    dict(attention_head_dim=12, vace_layers=[0, 2, 5], vace_in_channels=6),
)
row(
    "WanAnimateTransformer3DModel",
    {"hidden_states": normal(2, 12, 5, 4, 4)} | TEXT | AT_STEP | {
        "encoder_hidden_states_image": normal(2, 3, 4),
        "pose_hidden_states": normal(2, 4, 4, 4, 4),
        "face_pixel_values": normal(2, 3, 13, 16, 16),
    },
    dict(
        attention_head_dim=12, in_channels=12, latent_channels=4, image_dim=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    ),
    num_tokens=20,
)  # fmt: skip
row(
    "AnyFlowTransformer3DModel",
    VIDEO | {"timestep": steps(2, 4), "r_timestep": steps(2, 4)} | TEXT,
    dict(attention_head_dim=12),
)
row(
    "AllegroTransformer3DModel",
    {
        "image_rotary_emb": (
            ((normal(4, 4), normal(4, 4)),) * 3,
            tuple(axis.reshape(1, -1) for axis in torch.meshgrid(*map(torch.arange, (4, 2, 2)), indexing="ij")),
        ),
        "attention_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0] * 4]).view(2, 4, 1, 1).repeat(1, 1, 4, 4),
    } | VIDEO | TEXT | AT_STEP | MASK,
    dict(attention_head_dim=12, cross_attention_dim=24, sample_frames=4),
)  # fmt: skip
row(
    "CosmosTransformer3DModel",
    VIDEO | TEXT | AT_TIME | {"fps": 16},
    dict(
        attention_head_dim=12, adaln_lora_dim=4, max_size=(4, 8, 8), extra_pos_embed_type="learnable",
        concat_padding_mask=False,  # resizing it takes torchvision
    ),
)  # fmt: skip
row("CosmosTransformer3DModel-per_frame_time", {"timestep": lambda: torch.rand(2, 1, 4, 1, 1)})
row(
    "SanaVideoTransformer3DModel",
    {"hidden_states": normal(2, 4, 2, 6, 2)} | SANA,
    dict(
        attention_head_dim=12, cross_attention_dim=24, num_cross_attention_heads=2, cross_attention_head_dim=12,
        patch_size=(1, 1, 1),
    ),
    num_tokens=24,
    unit="row",
)  # fmt: skip
row("SanaVideoTransformer3DModel-per_token_time", {"timestep": steps(2, 24)})
row(
    "SanaWMTransformer3DModel",
    {
        "hidden_states": normal(2, 4, 2, 6, 2),
        "encoder_hidden_states": normal(2, 1, 5, 12),
        "timestep": steps(2, 1, 2),
        "camera_conditions": lambda: torch.cat(  # poses, and focal lengths and centres
            [torch.eye(4).flatten() + 0.1 * torch.randn(2, 2, 16), torch.tensor([5.0, 5.0, 2.0, 3.0]).expand(2, 2, 4)],
            dim=2,
        ),
        "chunk_plucker": normal(2, 6, 2, 6, 2),
    } | MASK,
    dict(hidden_size=32, linear_head_dim=16, chunk_plucker_channels=6),
    num_tokens=24,
    unit="row",
)  # fmt: skip
row("LTXVideoTransformer3DModel", TOKENS | TEXT | AT_STEP | MASK | VIDEO_SIZE)
row("LTXVideoTransformer3DModel-per_token_time", {"timestep": steps(2, 16)})
row(
    "LTX2VideoTransformer3DModel",
    TOKENS | {"audio_hidden_states": normal(2, 6, 4)} | TEXT | MASK | {
        "audio_encoder_hidden_states": normal(2, 5, 12),
        "audio_encoder_attention_mask": TEXT_MASK,
        "timestep": STEP,
        "audio_timestep": STEP,
        "sigma": TIME,
        "audio_num_frames": 6,
    } | VIDEO_SIZE,
    dict(attention_head_dim=16, cross_attention_dim=32, rope_double_precision=False, rope_type="interleaved"),
)  # fmt: skip
row("LTX2VideoTransformer3DModel-split_rope", {"timestep": steps(2, 16)}, dict(rope_type="split"))
row(
    "SanaWMLTX2RefinerTransformer3DModel",
    TOKENS | TEXT | MASK | {"timestep": steps(2, 16), "video_rotary_emb": (normal(2, 16, 32), normal(2, 16, 32))},
    dict(attention_head_dim=16, cross_attention_dim=32),
)
row(
    "Kandinsky5Transformer3DModel",
    VIDEO | TEXT | AT_STEP | POOLED
    | {"visual_rope_pos": [torch.arange(4), torch.arange(2), torch.arange(2)], "text_rope_pos": torch.arange(5)},
    batch_axes={"visual_rope_pos": None},
)  # fmt: skip
row(
    "Kandinsky6Transformer3DModel",
    VIDEO | TEXT | AT_STEP | POOLED | {"audio_hidden_states": normal(2, 6, 3)},
    dict(visual_cond=False, in_audio_dim=3, out_audio_dim=3),
)
row(
    "MiniMaxH3Transformer3DModel",
    TOKENS | {"audio_hidden_states": normal(2, 4, 3)} | TEXT | AT_STEP | {
        "timestep_indices": torch.tensor([0] * 5 + [0] * 12 + [1] * 4 + [0] * 4),
        "token_tags": torch.tensor([0] * 5 + [1] * 16 + [2] * 4),
        "position_ids": lambda: torch.randint(0, 6, (25, 3)).float(),
        "video_indices": torch.arange(5, 21),
        "audio_indices": torch.arange(21, 25),
        "text_indices": torch.arange(5),
    },
    dict(attention_head_dim=16, audio_in_channels=3, patch_size=(1, 1, 1), time_embed_hidden_dim=8, rope_freq_dim=2),
    starts={25: 5},
    shared=True,
    batch_axes={"timestep": None},
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- audio


row(
    "StableAudioDiTModel",
    AUDIO | TEXT | AT_TIME | BOOL_MASK
    | {"global_hidden_states": normal(2, 1, 6), "rotary_embedding": (normal(17, 4), normal(17, 4))},
    dict(
        sample_size=16, num_key_value_attention_heads=2, cross_attention_input_dim=12, time_proj_dim=8,
        global_states_input_dim=6,
    ),
    starts={17: 1},
)  # fmt: skip
row(
    "StableAudio3DiTModel",
    AUDIO | TEXT | AT_TIME | {"global_hidden_states": normal(2, 6), "local_add_cond": normal(2, 5, 16)},
    dict(
        io_channels=4, embed_dim=16, cond_token_dim=12, global_cond_dim=6, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=3,
    ),
    starts={19: 3},
)  # fmt: skip
row(
    "AceStepTransformer1DModel",
    {"hidden_states": normal(2, 32, 4), "timestep_r": TIME} | TEXT | AT_TIME | {"context_latents": normal(2, 32, 8)},
    dict(
        in_channels=12, num_hidden_layers=8, head_dim=8, audio_acoustic_hidden_dim=4, encoder_hidden_size=12,
        sliding_window=3,
    ),
)  # fmt: skip
row(
    "LongCatAudioDiTTransformer",
    TOKENS | TEXT | AT_TIME | BOOL_MASK | {"attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]).bool()},
    dict(dit_dim=16, dit_depth=8, dit_heads=2, dit_text_dim=12, latent_dim=4, use_latent_condition=False),
)
row(
    "MiniMaxMusic3Transformer1DModel",
    AUDIO | AT_TIME | {"encoder_hidden_states": normal(2, 16, 12)},
    dict(condition_dim=12, ff_inner_dim=16, rotary_dim=4, fourier_embedding_dim=8),
    starts={17: 1},
)
