# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What users of diffusers' pipelines expect of this one: callbacks that change the guidance, LoRA, a shared model."""

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from packaging.version import Version
from pipeline_calls import latents_of

from diffusers_tread import Branch, BranchGuidance, RatioSchedule, SparseGuidance


# Callbacks.


def test_a_callback_that_sets_the_scale_to_zero_ends_the_guidance(make_pipeline, record_calls, generators):
    pipe = make_pipeline()
    calls, _ = record_calls(pipe.transformer)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=2.0, callback_on_step_end=callback)
    assert [len(call[2]) for call in calls] == [4, 4, 2, 2, 2]  # of 5 predictions
    assert pipe.guidance_scale == 0.0


def test_a_callback_that_raises_the_scale_is_obeyed(make_pipeline, generators):
    pipe = make_pipeline()

    def raise_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=2.0, callback_on_step_end=raise_scale)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert not torch.equal(changed, latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=2.0))


def test_a_callback_may_end_or_replace_the_guider(make_pipeline, record_calls, generators):
    pipe = make_pipeline(guider=SparseGuidance(strong_ratio=0.25, weak_ratio=0.75))
    _, plans = record_calls(pipe.transformer)

    def change(pipe, step, timestep, tensors):
        if step == 0:
            pipe.guider = SparseGuidance(strong_ratio=0.0, weak_ratio=0.5)
        if step == 2:
            pipe._guidance_scale = 0.0
        return tensors

    latents_of(pipe, [1, 4], generators(0, 1), callback_on_step_end=change)
    kept = [None if plan is None else plan[0].shape[1] for plan in plans]
    assert kept == [12, 4, None, 8, None, 8, None, None]


def test_callback_tensors_that_there_are_not_are_refused(make_pipeline):
    names = r"\['latents', 'class_labels', 'prompt_embeds'\]"
    with pytest.raises(ValueError, match=rf"among {names}, got \['noise'\]"):
        latents_of(
            make_pipeline(), [1, 4], None, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"]
        )


def test_a_guider_of_a_callback_is_checked(make_pipeline):
    def change(pipe, step, timestep, tensors):
        pipe.guider = SparseGuidance(weak_checkpoint=True)

    with pytest.raises(ValueError, match="Expected a second denoiser for the weak branch"):
        latents_of(make_pipeline(), [1, 4], None, callback_on_step_end=change)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (Branch(selection_ratio=0.5), "Expected a denoiser with token routes"),
        (Branch(denoiser="guidance"), "Expected a guidance_transformer"),
    ],
)
def test_a_branch_that_the_denoisers_cannot_run_is_refused(make_pipeline, make_transformer, branch, message):
    class Guider(BranchGuidance):
        def branches(self):
            return [Branch(), branch]

        def forward(self, *predictions):
            raise NotImplementedError

    with pytest.raises(ValueError, match=message):
        transformer = make_transformer(objective="edm", routes=None)
        latents_of(make_pipeline(transformer=transformer, guider=Guider()), [1, 4], None)


def test_a_call_leaves_nothing_on_the_transformer(make_pipeline):
    pipe = make_pipeline()
    before = vars(pipe.transformer).copy()
    latents_of(pipe, [1, 4], None)
    assert vars(pipe.transformer) == before


def test_a_guider_is_told_nothing_of_a_sampling_and_obeyed_when_it_is_changed(make_pipeline, record_calls):
    guider = SparseGuidance(weak_ratio=RatioSchedule(first=0.75, last=0.25))
    pipe, before = make_pipeline(guider=guider), dict(vars(guider))
    calls, _ = record_calls(pipe.transformer)

    def change(pipe, step, timestep, tensors):
        pipe.guider.guidance_scale = 1.0

    latents_of(pipe, [1, 4], None)
    assert vars(guider) == before and len(calls) == 10  # two branches in each of 5 predictions
    latents_of(pipe, [1, 4], None, callback_on_step_end=change)
    assert len(calls) == 16


# LoRA.


def test_lora_is_saved_loaded_switched_and_fused(make_pipeline, make_transformer, generators, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = make_pipeline(guider=SparseGuidance())
    plain = latents_of(pipe, [1, 4], generators(0, 1))
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_qkv", "to_out.0"]), "one")
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted = latents_of(pipe, [1, 4], generators(0, 1))
    assert (adapted - plain).abs().max() > 0.01
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(
        pipe.transformer, adapter_name="one"
    ))  # fmt: skip

    pipe.delete_adapters("one")
    assert torch.equal(latents_of(pipe, [1, 4], generators(0, 1)), plain)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="two")
    assert pipe.get_list_adapters() == {"transformer": ["two"]} and pipe.get_active_adapters() == ["two"]
    torch.testing.assert_close(latents_of(pipe, [1, 4], generators(0, 1)), adapted, atol=1e-4, rtol=1e-4)
    if Version(diffusers.__version__) < Version("0.42"):
        return  # which has scales for its own classes alone
    pipe.set_adapters("two", 0.0)
    torch.testing.assert_close(latents_of(pipe, [1, 4], generators(0, 1)), plain, atol=1e-4, rtol=1e-4)
    pipe.set_adapters("two", 1.0)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipe, [1, 4], generators(0, 1)), adapted, atol=1e-3, rtol=1e-3)


# The mode of a shared model.


def test_dropout_that_is_active_is_refused_before_any_work(make_pipeline, record_calls):
    pipe = make_pipeline()
    pipe.transformer.transformer_blocks[2].ff.net[1].p = 0.1
    calls, _ = record_calls(pipe.transformer)
    pipe.transformer.train()
    with pytest.raises(ValueError, match=r"without active dropout, got transformer_blocks.2.ff.net.1 with p=0.1"):
        latents_of(pipe, [1, 4], None)
    assert calls == []
    pipe.transformer.eval()
    latents_of(pipe, [1, 4], None)


def test_a_model_in_training_mode_is_sampled_as_in_evaluation_mode(make_pipeline, generators):
    pipe = make_pipeline(guider=SparseGuidance())
    for settings in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 1.0}):
        expected = latents_of(pipe, [1, 4], generators(0, 1), **settings)
        pipe.transformer.train()
        assert torch.equal(latents_of(pipe, [1, 4], generators(0, 1), **settings), expected)
        assert pipe.transformer.training
        pipe.transformer.eval()
