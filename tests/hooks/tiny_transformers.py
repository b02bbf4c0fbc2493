# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A tiny random model and inputs for every transformer of diffusers that can be routed.

All parameters are random, so that no gate is zero, and masks have zeros in them. Widths are 2 heads of 8 channels,
most models have 16 image tokens and 5 text tokens, and 8 blocks, which are routed from 1 to 4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import torch


@dataclass
class Case:
    """One model with its inputs."""

    model: torch.nn.Module
    inputs: dict[str, Any]
    starts: dict[int, Any] = field(default_factory=dict)
    """By the length of a block's stream, where the image tokens start in it (per sample, if a list). Not given: 0."""
    num_tokens: int = 16
    """Number of routable tokens."""
    shared: bool = False
    """Whether the model needs one subset for all samples."""
    split: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    """How to take one sample from the inputs, if slicing all tensors of batch size 2 is not enough."""

    def sample(self, index: int) -> dict[str, Any]:
        """The inputs of one sample alone."""
        if self.split is not None:
            return self.split(self.inputs, index)
        return {name: _row(value, index) for name, value in self.inputs.items()}


def _row(value: Any, index: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 2:
        return value[index : index + 1]
    if isinstance(value, list) and len(value) == 2:
        return value[index : index + 1]
    return value


_BUILDERS: dict[str, Callable[[], Case]] = {}


def builder(name: str, *, needs: str | None = None):
    """Registers a case if this diffusers has the class, and its constructor the argument `needs`.

    "Class-variant" is another configuration of the same class.
    """

    def add(function):
        model_class = getattr(diffusers, name.split("-")[0], None)
        if model_class is not None and (needs is None or needs in signature(model_class.__init__).parameters):
            _BUILDERS[name] = function
        return function

    return add


def names() -> list[str]:
    return list(_BUILDERS)


def build(name: str) -> Case:
    torch.manual_seed(1)
    case = _BUILDERS[name]()
    case.model = randomise(case.model).eval()
    return case


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Gives all parameters random values, the zero-initialised gates too."""
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else max(1, parameter.shape[1:].numel()) ** -0.5
        parameter.normal_(0.0, scale)
    return model


def make(name: str, **config: Any) -> torch.nn.Module:
    return getattr(diffusers, name)(**config)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape)


def text(width: int, length: int = 5) -> torch.Tensor:
    return torch.randn(2, length, width)


TIME = torch.tensor([0.3, 0.7])
STEP = torch.tensor([300.0, 700.0])
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def image_ids(count: int = 16) -> torch.Tensor:
    ids = torch.zeros(count, 3)
    ids[:, 1], ids[:, 2] = torch.arange(count) // 4, torch.arange(count) % 4
    return ids


# ---------------------------------------------------------------------------------------------------------- images


@builder("DiTTransformer2DModel")
def dit():
    # `num_embeds_ada_norm` counts the classes; the null class dropped in training is left out for determinism.
    model = make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    labels = torch.tensor([1, 4])
    return Case(model, {"hidden_states": latents(4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": labels})


@builder("PixArtTransformer2DModel")
def pixart():
    model = make(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    )
    attention_mask = torch.ones(2, 16)
    attention_mask[0, 3:6] = 0
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "attention_mask": attention_mask,
        "encoder_attention_mask": TEXT_MASK,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Case(model, inputs)


@builder("SD3Transformer2DModel")
def sd3(**config):
    model = make(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
        **config,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "pooled_projections": torch.randn(2, 6),
        "timestep": STEP,
    }
    return Case(model, inputs)


@builder("SD3Transformer2DModel-3.5")
def sd35():
    return sd3(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm")


@builder("AuraFlowTransformer2DModel")
def auraflow():
    model = make(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    inputs = {"hidden_states": latents(4, 8, 8), "encoder_hidden_states": text(12), "timestep": TIME}
    return Case(model, inputs, starts={16 + 8 + 5: 8 + 5})  # 8 register tokens


@builder("CogView3PlusTransformer2DModel")
def cogview3plus():
    model = make(
        "CogView3PlusTransformer2DModel",
        in_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return Case(model, _cogview_inputs())


@builder("CogView4Transformer2DModel")
def cogview4():
    model = make(
        "CogView4Transformer2DModel",
        in_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return Case(model, _cogview_inputs())


def _cogview_inputs():
    return {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "original_size": torch.tensor([[8.0, 8.0], [9.0, 7.0]]),
        "target_size": torch.tensor([[8.0, 8.0], [9.0, 7.0]]),
        "crop_coords": torch.zeros(2, 2),
    }


@builder("GlmImageTransformer2DModel")
def glm_image():
    model = make(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=20,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "encoder_hidden_states": text(12),
        "prior_token_id": torch.randint(0, 20, (2, 16)),
        "prior_token_drop": torch.tensor([False, False]),
        "timestep": STEP,
        "target_size": torch.tensor([[8.0, 8.0], [9.0, 7.0]]),
        "crop_coords": torch.zeros(2, 2),
    }
    return Case(model, inputs)


def _flux_like(name: str, *, pooled: bool = True, **config):
    model = make(
        name,
        in_channels=4,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=config.pop("axes_dims_rope", (2, 2, 4)),
        **config,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "timestep": TIME,
        "img_ids": image_ids(),
        "txt_ids": torch.zeros(5, 3),
    }
    if pooled:
        inputs["pooled_projections"] = torch.randn(2, 6)
    return Case(model, inputs)


@builder("FluxTransformer2DModel")
def flux():
    return _flux_like("FluxTransformer2DModel", pooled_projection_dim=6)


@builder("ChromaTransformer2DModel")
def chroma():
    case = _flux_like(
        "ChromaTransformer2DModel",
        pooled=False,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    mask = torch.ones(2, 21)
    mask[:, :5] = TEXT_MASK
    case.inputs["attention_mask"] = mask
    case.starts = {21: 5}
    return case


@builder("BriaTransformer2DModel")
def bria():
    return _flux_like("BriaTransformer2DModel", pooled=False)


@builder("BriaFiboTransformer2DModel")
def bria_fibo():
    case = _flux_like("BriaFiboTransformer2DModel", pooled=False, text_encoder_dim=6)
    case.inputs["text_encoder_layers"] = [torch.randn(2, 5, 6) for _ in range(8)]
    case.split = lambda inputs, i: {
        k: [x[i : i + 1] for x in v] if k == "text_encoder_layers" else _row(v, i) for k, v in inputs.items()
    }
    case.starts = {21: 5}
    return case


@builder("OvisImageTransformer2DModel")
def ovis():
    return _flux_like("OvisImageTransformer2DModel", pooled=False, out_channels=4)


@builder("LongCatImageTransformer2DModel")
def longcat():
    return _flux_like("LongCatImageTransformer2DModel", pooled=False, pooled_projection_dim=12)


@builder("Flux2Transformer2DModel")
def flux2():
    config = {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8}
    case = _flux_like("Flux2Transformer2DModel", pooled=False, **config)
    case.inputs["img_ids"] = torch.cat([image_ids(), torch.zeros(16, 1)], dim=1)
    case.inputs["txt_ids"] = torch.cat([torch.zeros(5, 3), torch.arange(5.0).unsqueeze(1)], dim=1)
    case.inputs["guidance"] = torch.tensor([3.5, 4.0])
    case.starts = {21: 5}
    return case


def _flux3(conditions: int):
    model = make(
        "Flux3Transformer2DModel",
        in_channels=4,
        cond_in_channels=4,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "timestep": TIME,
        "img_ids": torch.cat([image_ids(), torch.zeros(16, 1)], dim=1),
        "txt_ids": torch.cat([torch.zeros(5, 3), torch.arange(5.0).unsqueeze(1)], dim=1),
    }
    if conditions:
        inputs["image_cond_hidden_states"] = latents(conditions, 4)
        inputs["image_cond_ids"] = torch.randint(0, 9, (conditions, 4)).float()
    return Case(model, inputs)


@builder("Flux3Transformer2DModel")
def flux3():
    return _flux3(0)


@builder("Flux3Transformer2DModel-references")
def flux3_references():
    return _flux3(6)


def _qwen(shapes, num_tokens, **config):
    model = make(
        "QwenImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        **config,
    )
    inputs = {
        "hidden_states": latents(num_tokens, 4),
        "encoder_hidden_states": text(12),
        "encoder_hidden_states_mask": TEXT_MASK,
        "timestep": TIME,
        "img_shapes": [shapes, shapes],
    }
    if "txt_seq_lens" in signature(model.forward).parameters:  # until diffusers 0.36
        inputs["txt_seq_lens"] = [5, 5]
    return Case(model, inputs)


@builder("QwenImageTransformer2DModel")
def qwen():
    return _qwen([(1, 4, 4)], 16)


@builder("QwenImageTransformer2DModel-edit", needs="zero_cond_t")
def qwen_edit():
    return _qwen([(1, 4, 4), (1, 2, 3)], 22, zero_cond_t=True)


@builder("QwenImage21Transformer2DModel")
def qwen21():
    model = make(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    # Seven text slots, then four slots of four tokens each for the 4x4 target.
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12, 7),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "timestep": TIME,
        "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 7 + [True] * 4] * 2),
    }
    return Case(model, inputs, starts={23: 7})


@builder("NucleusMoEImageTransformer2DModel")
def nucleus():
    model = make(
        "NucleusMoEImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=[1.0] * 8,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "encoder_hidden_states_mask": TEXT_MASK.bool(),
        "timestep": TIME,
        "img_shapes": [(1, 4, 4), (1, 4, 4)],
    }
    return Case(model, inputs)


@builder("PRXTransformer2DModel")
def prx():
    model = make(
        "PRXTransformer2DModel",
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        num_heads=2,
        depth=8,
        axes_dim=[4, 4],
        mlp_ratio=2.0,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": text(12),
        "attention_mask": TEXT_MASK.bool(),
    }
    return Case(model, inputs)


@builder("HunyuanDiT2DModel")
def hunyuan_dit():
    model = make(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=12,  # the routed blocks 7 and 8 take skip connections
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=5,
        text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "text_embedding_mask": TEXT_MASK,
        "encoder_hidden_states_t5": text(16, 3),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
    }
    return Case(model, inputs)


@builder("LuminaNextDiT2DModel")
def lumina_next():
    model = make(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=8,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=12,
    )
    angles = torch.randn(8, 8, 4)
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": text(12),
        "encoder_mask": TEXT_MASK,
        "cross_attention_kwargs": {},
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
    }
    return Case(model, inputs)


@builder("Lumina2Transformer2DModel")
def lumina2():
    model = make(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=8,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(20, 8, 8),
        cap_feat_dim=12,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK,
    }
    return Case(model, inputs, starts={20: [4, 3]})


@builder("ZImageTransformer2DModel")
def z_image():
    model = make(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=8,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    inputs = {
        "x": [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)],
        "t": TIME,
        "cap_feats": [torch.randn(5, 12), torch.randn(3, 12)],
    }
    return Case(model, inputs)


@builder("BriaFibo2Transformer2DModel")
def fibo2():
    return _fibo2([400, 400], {48: 32})


@builder("BriaFibo2Transformer2DModel-uneven")
def fibo2_uneven():
    return _fibo2([2048, 256], {})


def _fibo2(lengths, starts):
    model = make(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=8,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=12,
        injection_layer_ids=(2, 4),
        perceiver_num_layers=1,
        min_num_gist_tokens=16,
        max_num_gist_tokens=32,
        gist_step=16,
        axes_dims=(4, 2, 2),
        axes_lens=(2048, 64, 64),
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(2, 3, max(lengths), 12),
        "encoder_attention_mask": mask,
    }
    return Case(model, inputs, starts=starts)


@builder("Krea2Transformer2DModel")
def krea2():
    model = make(
        "Krea2Transformer2DModel",
        in_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=12,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 2, 12),
        "timestep": TIME,
        "position_ids": torch.cat([torch.zeros(5, 3), image_ids()]),
        "encoder_attention_mask": TEXT_MASK.bool(),
    }
    return Case(model, inputs, starts={21: 5})


@builder("Ideogram4Transformer2DModel")
def ideogram4():
    model = make(
        "Ideogram4Transformer2DModel",
        in_channels=4,
        num_layers=8,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )
    # Padding before the text, so that the image starts at 5 in both samples' packed sequences.
    indicator = torch.tensor([[3] * 5 + [2] * 16, [0] * 2 + [3] * 3 + [2] * 16])
    segments = torch.tensor([[1] * 21, [-1] * 2 + [1] * 19])
    positions = torch.cat([torch.arange(5.0).unsqueeze(1).expand(-1, 3), image_ids() + 5]).long()
    inputs = {
        "hidden_states": latents(21, 4),
        "timestep": TIME,
        "encoder_hidden_states": text(12, 21),
        "position_ids": positions.expand(2, -1, -1),
        "segment_ids": segments,
        "indicator": indicator,
    }
    return Case(model, inputs, starts={21: 5})


@builder("OmniGenTransformer2DModel")
def omnigen():
    model = make(
        "OmniGenTransformer2DModel",
        in_channels=4,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=8,
        pad_token_id=0,
        vocab_size=50,
        pos_embed_max_size=8,
        time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )
    length = 5 + 1 + 16
    mask = torch.ones(2, length, length)
    mask[:, :6, :6] = torch.ones(6, 6).tril()
    mask[:, :6, 6:] = 0
    mask[1, :, :2] = 0
    mask[1, :2, :2] = torch.eye(2)
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timestep": TIME,
        "input_ids": torch.randint(0, 50, (2, 5)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).expand(2, -1),
    }
    return Case(model, inputs, starts={22: 6})


@builder("HiDreamImageTransformer2DModel")
def hidream():
    model = make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[12, 10],
        text_emb_dim=6,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0] * 8,
        force_inference_output=True,
    )
    inputs = {
        "hidden_states": latents(4, 8, 8),
        "timesteps": STEP,
        "encoder_hidden_states_t5": text(12, 3),
        "encoder_hidden_states_llama3": torch.randn(1, 2, 5, 10),
        "pooled_embeds": torch.randn(2, 6),
    }
    case = Case(model, inputs)
    case.split = lambda inputs, i: {
        k: v[:, i : i + 1] if k == "encoder_hidden_states_llama3" else _row(v, i) for k, v in inputs.items()
    }
    return case


@builder("ErnieImageTransformer2DModel")
def ernie():
    model = make(
        "ErnieImageTransformer2DModel",
        hidden_size=16,
        num_attention_heads=2,
        num_layers=8,
        ffn_hidden_size=16,
        in_channels=4,
        out_channels=4,
        text_in_dim=12,
        rope_axes_dim=(4, 2, 2),
    )
    inputs = {
        "hidden_states": latents(4, 4, 4),
        "timestep": STEP,
        "text_bth": text(12),
        "text_lens": torch.tensor([4, 3]),
    }
    return Case(model, inputs)


@builder("HunyuanImageTransformer2DModel")
def hunyuan_image():
    model = make(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_single_layers=5,
        num_refiner_layers=1,
        text_embed_dim=12,
        rope_axes_dim=(4, 4),
    )
    inputs = {
        "hidden_states": latents(4, 4, 4),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK,
    }
    return Case(model, inputs)


@builder("JoyImageEditTransformer3DModel")
def joy_image():
    model = make(
        "JoyImageEditTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=12,
        num_layers=8,
        rope_dim_list=[2, 2, 4],
    )
    inputs = {
        "hidden_states": latents(2, 4, 1, 8, 8),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
    }
    return Case(model, inputs)


@builder("JoyImageEditPlusTransformer3DModel")
def joy_image_plus():
    model = make(
        "JoyImageEditPlusTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=12,
        num_layers=8,
        rope_dim_list=[2, 2, 4],
    )
    inputs = {
        "hidden_states": torch.randn(2, 24, 4, 1, 2, 2),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_hidden_states_mask": TEXT_MASK.float(),
        "shape_list": [[(1, 4, 4), (1, 2, 4)], [(1, 4, 4), (1, 2, 2)]],
    }
    return Case(model, inputs)


# ----------------------------------------------------------------------------------------------------------- video


@builder("CogVideoXTransformer3DModel")
def cogvideox():
    model = make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=8,
        sample_width=4,
        sample_height=4,
        sample_frames=13,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
    }
    return Case(model, inputs)


@builder("ConsisIDTransformer3DModel")
def consisid():
    model = make(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=8,
        sample_width=4,
        sample_height=4,
        sample_frames=13,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=4,
        cross_attn_num_heads=2,
        LFE_id_dim=6,
        LFE_vit_dim=6,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=10,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
        "id_cond": torch.randn(2, 6),
        "id_vit_hidden": [torch.randn(2, 3, 6) for _ in range(5)],
    }
    case = Case(model, inputs)
    case.split = lambda inputs, i: {
        k: [x[i : i + 1] for x in v] if k == "id_vit_hidden" else (v if k == "image_rotary_emb" else _row(v, i))
        for k, v in inputs.items()
    }
    return case


@builder("EasyAnimateTransformer3DModel")
def easyanimate():
    model = make(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=8,
        time_embed_dim=8,
        text_embed_dim=12,
    )
    inputs = {"hidden_states": latents(4, 4, 4, 4), "timestep": STEP, "encoder_hidden_states": text(12)}
    return Case(model, inputs)


def _hunyuan_video(name="HunyuanVideoTransformer3DModel", **config):
    model = make(
        name,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_single_layers=5,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=False,
        text_embed_dim=12,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 2, 4),
        **config,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK,
        "pooled_projections": torch.randn(2, 6),
    }
    return Case(model, inputs)


@builder("HunyuanVideoTransformer3DModel")
def hunyuan_video():
    return _hunyuan_video()


@builder("HunyuanVideoTransformer3DModel-token_replace")
def hunyuan_video_token_replace():
    case = _hunyuan_video(image_condition_type="token_replace")
    case.starts, case.num_tokens = {16: 4}, 12
    return case


@builder("HunyuanVideoFramepackTransformer3DModel")
def framepack():
    case = _hunyuan_video(
        "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True
    )
    case.inputs |= {
        "image_embeds": torch.randn(2, 3, 6),
        "indices_latents": torch.arange(4),
        "latents_clean": latents(4, 2, 4, 4),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": latents(4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": latents(4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    }
    case.starts = {26: 10}  # ten tokens of history
    case.split = lambda inputs, i: {k: v if k.startswith("indices") else _row(v, i) for k, v in inputs.items()}
    return case


@builder("HunyuanVideo15Transformer3DModel")
def hunyuan_video15():
    model = make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=8,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=6,
        rope_axes_dim=(2, 2, 4),
    )
    inputs = {
        "hidden_states": latents(4, 1, 4, 4),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK,
        "encoder_hidden_states_2": text(10, 3),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "image_embeds": torch.randn(2, 4, 6),
    }
    return Case(model, inputs)


@builder("MotifVideoTransformer3DModel")
def motif():
    return _motif(0)


@builder("MotifVideoTransformer3DModel-decoder")
def motif_decoder():
    return _motif(4)  # blocks 4 to 7, of which 4 is routed


def _motif(decoder_layers):
    model = make(
        "MotifVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=6,
        num_decoder_layers=decoder_layers,
        text_embed_dim=12,
        image_embed_dim=6,
        rope_axes_dim=(2, 2, 4),
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK,
        "image_embeds": torch.randn(2, 3, 6),
    }
    return Case(model, inputs)


@builder("MochiTransformer3DModel")
def mochi():
    model = make(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=8,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(16),
        "timestep": STEP,
        "encoder_attention_mask": TEXT_MASK.bool(),
    }
    return Case(model, inputs)


def _wan(name="WanTransformer3DModel", frames=4, **config):
    defaults = {"freq_dim": 8, "text_dim": 12, "ffn_dim": 16, "qk_norm": "rms_norm_across_heads"}
    model = make(
        name,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        rope_max_seq_len=32,
        **(defaults | config),
    )
    inputs = {"hidden_states": latents(4, frames, 4, 4), "timestep": STEP, "encoder_hidden_states": text(12)}
    return Case(model, inputs)


@builder("WanTransformer3DModel")
def wan():
    return _wan()


@builder("WanTransformer3DModel-per_token_time")
def wan_ti2v():
    case = _wan()
    case.inputs["timestep"] = 1000 * torch.rand(2, 16)
    return case


@builder("ChronoEditTransformer3DModel")
def chronoedit():
    return _wan("ChronoEditTransformer3DModel", rope_temporal_skip_len=4)


@builder("SkyReelsV2Transformer3DModel")
def skyreels():
    return _wan("SkyReelsV2Transformer3DModel")


@builder("SkyReelsV2Transformer3DModel-forcing")
def skyreels_forcing():
    case = _wan("SkyReelsV2Transformer3DModel", num_frame_per_block=2)
    case.inputs |= {"timestep": 1000 * torch.rand(2, 4), "enable_diffusion_forcing": True}
    return case


@builder("WanVACETransformer3DModel")
def wan_vace():
    case = _wan("WanVACETransformer3DModel", vace_layers=[0, 2, 5], vace_in_channels=6)
    case.inputs["control_hidden_states"] = latents(6, 4, 4, 4)
    return case


@builder("WanAnimateTransformer3DModel")
def wan_animate():
    model = make(
        "WanAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=16,
        num_layers=8,
        image_dim=4,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        "hidden_states": latents(12, 5, 4, 4),
        "timestep": STEP,
        "encoder_hidden_states": text(12),
        "encoder_hidden_states_image": torch.randn(2, 3, 4),
        "pose_hidden_states": latents(4, 4, 4, 4),
        "face_pixel_values": latents(3, 13, 16, 16),
    }
    return Case(model, inputs, num_tokens=20)


@builder("AnyFlowTransformer3DModel")
def anyflow():
    model = make(
        "AnyFlowTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=16,
        num_layers=8,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "timestep": 1000 * torch.rand(2, 4),
        "r_timestep": 1000 * torch.rand(2, 4),
        "encoder_hidden_states": text(12),
    }
    return Case(model, inputs)


@builder("AllegroTransformer3DModel")
def allegro():
    model = make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=4,
        caption_channels=12,
    )
    freqs = tuple((torch.randn(4, 4), torch.randn(4, 4)) for _ in range(3))
    grids = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(2), indexing="ij")
    mask = torch.ones(2, 4, 4, 4)
    mask[0, 1] = 0
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "attention_mask": mask,
        "encoder_attention_mask": TEXT_MASK,
        "image_rotary_emb": (freqs, tuple(grid.reshape(1, -1) for grid in grids)),
    }
    case = Case(model, inputs)
    case.split = lambda inputs, i: {k: v if k == "image_rotary_emb" else _row(v, i) for k, v in inputs.items()}
    return case


def _cosmos(timestep):
    model = make(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=8,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,  # resizing it takes torchvision
        extra_pos_embed_type="learnable",
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "timestep": timestep,
        "encoder_hidden_states": text(12),
        "fps": 16,
    }
    return Case(model, inputs)


@builder("CosmosTransformer3DModel")
def cosmos():
    return _cosmos(TIME)


@builder("CosmosTransformer3DModel-per_frame_time")
def cosmos_per_frame():
    return _cosmos(torch.rand(2, 1, 4, 1, 1))


@builder("LTXVideoTransformer3DModel")
def ltx():
    return _ltx(STEP)


@builder("LTXVideoTransformer3DModel-per_token_time")
def ltx_per_token():
    return _ltx(1000 * torch.rand(2, 16))


def _ltx(timestep):
    model = make(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=8,
        caption_channels=12,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "timestep": timestep,
        "encoder_attention_mask": TEXT_MASK,
        "num_frames": 4,
        "height": 2,
        "width": 2,
    }
    return Case(model, inputs)


@builder("LTX2VideoTransformer3DModel")
def ltx2():
    return _ltx2("interleaved")


@builder("LTX2VideoTransformer3DModel-split_rope")
def ltx2_split():
    case = _ltx2("split")
    case.inputs["timestep"] = 1000 * torch.rand(2, 16)
    return case


def _ltx2(rope_type):
    model = make(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=8,
        caption_channels=12,
        rope_double_precision=False,
        rope_type=rope_type,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "audio_hidden_states": latents(6, 4),
        "encoder_hidden_states": text(12),
        "audio_encoder_hidden_states": text(12),
        "timestep": STEP,
        "audio_timestep": STEP,
        "sigma": TIME,
        "encoder_attention_mask": TEXT_MASK,
        "audio_encoder_attention_mask": TEXT_MASK,
        "num_frames": 4,
        "height": 2,
        "width": 2,
        "audio_num_frames": 6,
    }
    return Case(model, inputs)


@builder("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner():
    model = make(
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=8,
        caption_channels=12,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "timestep": 1000 * torch.rand(2, 16),
        "video_rotary_emb": (torch.randn(2, 16, 32), torch.randn(2, 16, 32)),
        "encoder_attention_mask": TEXT_MASK,
    }
    case = Case(model, inputs)
    case.split = lambda inputs, i: {
        k: tuple(x[i : i + 1] for x in v) if k == "video_rotary_emb" else _row(v, i) for k, v in inputs.items()
    }
    return case


@builder("Kandinsky5Transformer3DModel")
def kandinsky5():
    model = make(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=6,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=8,
        axes_dims=(4, 2, 2),
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "pooled_projections": torch.randn(2, 6),
        "visual_rope_pos": [torch.arange(4), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(5),
    }
    return Case(model, inputs)


@builder("Kandinsky6Transformer3DModel")
def kandinsky6():
    model = make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=6,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=8,
        axes_dims=(4, 2, 2),
        visual_cond=False,
        in_audio_dim=3,
        out_audio_dim=3,
    )
    inputs = {
        "hidden_states": latents(4, 4, 4, 4),
        "encoder_hidden_states": text(12),
        "pooled_projections": torch.randn(2, 6),
        "timestep": STEP,
        "audio_hidden_states": torch.randn(2, 6, 3),
    }
    return Case(model, inputs)


@builder("MiniMaxH3Transformer3DModel")
def minimax_h3():
    model = make(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=16,
        num_layers=8,
        num_refiner_layers=1,
        ffn_dim=16,
        in_channels=4,
        audio_in_channels=3,
        patch_size=(1, 1, 1),
        text_dim=12,
        freq_dim=8,
        time_embed_hidden_dim=8,
        time_embed_dim=8,
        rope_freq_dim=2,
    )
    inputs = {
        "hidden_states": latents(16, 4),
        "audio_hidden_states": latents(4, 3),
        "encoder_hidden_states": text(12),
        "timestep": STEP,
        "timestep_indices": torch.tensor([0] * 5 + [0] * 12 + [1] * 4 + [0] * 4),
        "token_tags": torch.tensor([0] * 5 + [1] * 16 + [2] * 4),
        "position_ids": torch.randint(0, 6, (25, 3)).float(),
        "video_indices": torch.arange(5, 21),
        "audio_indices": torch.arange(21, 25),
        "text_indices": torch.arange(5),
    }
    case = Case(model, inputs, starts={25: 5}, shared=True)
    case.split = lambda inputs, i: {k: _row(v, i) if k.endswith("hidden_states") else v for k, v in inputs.items()}
    return case


# ----------------------------------------------------------------------------------------------------------- audio


@builder("StableAudioDiTModel")
def stable_audio():
    model = make(
        "StableAudioDiTModel",
        sample_size=16,
        in_channels=4,
        num_layers=8,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=6,
        cross_attention_input_dim=12,
    )
    inputs = {
        "hidden_states": latents(4, 16),
        "timestep": TIME,
        "encoder_hidden_states": text(12),
        "global_hidden_states": torch.randn(2, 1, 6),
        "rotary_embedding": (torch.randn(17, 4), torch.randn(17, 4)),
        "encoder_attention_mask": TEXT_MASK.bool(),
    }
    return Case(model, inputs, starts={17: 1})


@builder("StableAudio3DiTModel")
def stable_audio3():
    model = make(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=8,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=6,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        num_memory_tokens=3,
    )
    inputs = {
        "hidden_states": latents(4, 16),
        "timestep": TIME,
        "encoder_hidden_states": text(12),
        "global_hidden_states": torch.randn(2, 6),
        "local_add_cond": latents(5, 16),
    }
    return Case(model, inputs, starts={19: 3})


@builder("AceStepTransformer1DModel")
def ace_step():
    model = make(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=3,
        encoder_hidden_size=12,
    )
    inputs = {
        "hidden_states": latents(32, 4),
        "timestep": TIME,
        "timestep_r": TIME,
        "encoder_hidden_states": text(12),
        "context_latents": latents(32, 8),
    }
    return Case(model, inputs)


@builder("LongCatAudioDiTTransformer")
def longcat_audio():
    model = make(
        "LongCatAudioDiTTransformer",
        dit_dim=16,
        dit_depth=8,
        dit_heads=2,
        dit_text_dim=12,
        latent_dim=4,
        use_latent_condition=False,
    )
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 12:] = False
    inputs = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(12),
        "encoder_attention_mask": TEXT_MASK.bool(),
        "timestep": TIME,
        "attention_mask": mask,
    }
    return Case(model, inputs)


@builder("MiniMaxMusic3Transformer1DModel")
def minimax_music3():
    model = make(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=12,
        num_layers=8,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=16,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )
    inputs = {"hidden_states": latents(4, 16), "timestep": TIME, "encoder_hidden_states": text(12, 16)}
    return Case(model, inputs, starts={17: 1})
