# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Every kind of guidance in `TREADPipeline`, against its formula written out with direct calls of the models."""

import contextlib
import json

import pytest
import torch
from closeness import difference, rounding
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FlowMatchEulerDiscreteScheduler,
    TangentialClassifierFreeGuidance,
)
from pipeline_calls import latents_of

from diffusers_tread import (
    EDMHeunScheduler,
    RatioSchedule,
    RoutingCall,
    SparseGuidance,
    TREADPipeline,
    get_token_router,
    token_routing,
)


SG, AG = {"guidance_scale": 1.6}, {"guidance_scale": 2.0, "weak_checkpoint": True}
FALLING, LINE = RatioSchedule(first=0.6, last=0.0), RatioSchedule(first=0.6, last=0.0, shape="linear")
# Per kind: the guider, and per branch of each of 4 steps the model, the ratio and the share of the condition.
# The half cosine from 0.6 to 0 passes 0.6 * 3/4 and 0.6 * 1/4.
MAIN, EARLY, NULL = ("main", 0.0, 1), ("early", 0.0, 1), ("main", 0.0, 0)
RATIOS, SPARSE = {"strong_ratio": 0.25, "weak_ratio": 0.75}, [("main", 0.25, 1), ("main", 0.75, 1)]
KINDS = {
    "CFG": (ClassifierFreeGuidance(guidance_scale=1.6), [[MAIN, NULL]] * 4),
    "CFG in an interval": (
        ClassifierFreeGuidance(guidance_scale=1.6, start=0.25, stop=0.75),
        [[MAIN], [MAIN, NULL], [MAIN, NULL], [MAIN]],
    ),
    "SG": (SparseGuidance(**SG, **RATIOS), [SPARSE] * 4),
    "SG in an interval": (
        SparseGuidance(**SG, **RATIOS, start=0.25, stop=0.75),
        [[MAIN], SPARSE, SPARSE, [MAIN]],
    ),
    "SG with a cosine": (
        SparseGuidance(**SG, strong_ratio=0.0, weak_ratio=FALLING),
        [[MAIN, ("main", ratio, 1)] for ratio in (0.6, 0.45, 0.15, 0.0)],
    ),
    "SG with a line": (
        SparseGuidance(**SG, strong_ratio=0.0, weak_ratio=LINE),
        [[MAIN, ("main", ratio, 1)] for ratio in (0.6, 0.4, 0.2, 0.0)],
    ),
    "CFG+SG": (
        SparseGuidance(**SG, **RATIOS, null_weak_branch=True),
        [[("main", 0.25, 1), ("main", 0.75, 0)]] * 4,
    ),
    "AG": (SparseGuidance(**AG, strong_ratio=0.0, weak_ratio=0.0), [[MAIN, EARLY]] * 4),
    "AG+SG": (SparseGuidance(**AG, strong_ratio=0.0, weak_ratio=0.75), [[MAIN, ("early", 0.75, 1)]] * 4),
    "SG_FID": (
        SparseGuidance.from_preset("fid", guidance_scale=1.6),
        [[("main", 0.6 - ratio, 1), ("early", ratio, 1)] for ratio in (0.6, 0.45, 0.15, 0.0)],
    ),
}


@pytest.fixture
def make_guided(make_pipeline, make_transformer, objective_of):
    """Makes pipelines with an earlier checkpoint, here a smaller model, for the guiders that run one."""

    def make(guider, scheduler=None, **settings):
        scheduler = scheduler or EDMHeunScheduler()
        settings |= {"objective": objective_of(scheduler)}
        needs_checkpoint = getattr(guider, "weak_checkpoint", False)
        early = make_transformer(num_attention_heads=1, **settings) if needs_checkpoint else None
        guider = None if guider is None else guider.new()
        return make_pipeline(scheduler, make_transformer(**settings), guider=guider, guidance_transformer=early)

    return make


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_guidance_equals_its_formula_through_euler_steps(make_guided, kind):
    guider, steps = KINDS[kind]
    pipe, seed = make_guided(guider, FlowMatchEulerDiscreteScheduler()), torch.tensor([3, 4])
    models = {"main": pipe.transformer, "early": pipe.guidance_transformer}
    for model in filter(None, models.values()):
        get_token_router(model).defaults = RoutingCall(seed=seed)
    x, sigmas = torch.randn(2, 3, 8, 8), [1.0, 0.75, 0.5, 0.25, 0.0]
    images = pipe([1, 4], sigmas=sigmas[:-1], latents=x, output_type="latent").images

    for sigma, next_sigma, branches in zip(sigmas, sigmas[1:], steps, strict=False):
        predictions = []
        for name, ratio, has_condition in branches:
            labels = torch.tensor([1, 4]) if has_condition else torch.tensor([5, 5])
            with token_routing(models[name], selection_ratio=ratio):
                predictions.append(models[name](x, torch.tensor(1000.0 * sigma), labels).sample)
        strong, weak = predictions[0], predictions[-1]
        x = x + (next_sigma - sigma) * (strong + (guider.guidance_scale - 1) * (strong - weak))
    torch.testing.assert_close(images, x, atol=1e-4, rtol=1e-4)

    # Each kind is another one than no guidance.
    plain = pipe([1, 4], sigmas=sigmas[:-1], latents=x, output_type="latent", guidance_scale=1.0).images
    assert (plain - images).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["CFG", "SG", "CFG+SG", "AG+SG", "SG_FID"])
def test_full_rescaling_gives_the_deviation_of_the_strong_branch(make_guided, kind):
    # arXiv 2305.08891, equation 15. One step from sigma 1 to 0 is the prediction itself.
    pipe, x = make_guided(KINDS[kind][0], FlowMatchEulerDiscreteScheduler()), torch.randn(1, 3, 8, 8)
    pipe.transformer.token_router.defaults = RoutingCall(seed=3)
    deviations = []
    for settings in ({"guidance_scale": 1.0}, {}, {"guidance_rescale": 1.0}):
        pipe.guider = KINDS[kind][0].new(**settings)
        deviations.append((x - latents_of(pipe, 1, None, sigmas=[1.0], latents=x)).std().item())
    strong, plain, rescaled = deviations
    assert abs(plain - strong) > 0.01 and rescaled == pytest.approx(strong, rel=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "APG"])
def test_an_image_does_not_depend_on_its_batch_however_guided(make_guided, record_calls, generators, kind):
    guider = AdaptiveProjectedGuidance(guidance_scale=2.0, adaptive_projected_guidance_momentum=-0.5)
    pipe = make_guided(KINDS[kind][0] if kind in KINDS else guider, FlowMatchEulerDiscreteScheduler())
    models = [model for model in (pipe.transformer, pipe.guidance_transformer) if model is not None]
    plans = [record_calls(model)[1] for model in models]
    batch = latents_of(pipe, [1, 4, 0], generators(10, 11, 12))
    batch_plans = [many.copy() for many in plans]
    for many in plans:
        many.clear()
    alone = latents_of(pipe, [4], generators(11))
    torch.testing.assert_close(batch[1:2], alone, atol=1e-4, rtol=1e-4)

    # The subsets are the same to the bit.
    for batch_plan, plan in zip(batch_plans, plans, strict=True):
        assert len(plan) == len(batch_plan) > 0
        for many, one in zip(batch_plan, plan, strict=True):
            assert many is one is None or torch.equal(many[0][1:2], one[0])


# What runs, and with `guidance_scale` in the call instead of a guider.


def test_classifier_free_guidance_is_one_forward_per_step(make_pipeline, record_calls):
    pipe = make_pipeline()
    calls, plans = record_calls(pipe.transformer)
    pipe([1, 4], num_inference_steps=3, guidance_scale=1.5)
    assert [call[2].tolist() for call in calls] == [[1, 4, 5, 5]] * 5
    assert plans == [None] * 5  # dense
    assert pipe.guidance_scale == 1.5 and pipe.num_timesteps == 5


@pytest.mark.parametrize("guidance_scale", [None, 0.0, 1.0])
def test_without_guidance_the_null_class_is_not_run(make_pipeline, record_calls, generators, guidance_scale):
    pipe = make_pipeline()
    calls, _ = record_calls(pipe.transformer)
    images = latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=guidance_scale)
    assert [call[2].tolist() for call in calls] == [[1, 4]] * 5
    assert torch.equal(images, latents_of(pipe, [1, 4], generators(0, 1)))


def test_sparse_guidance_conditions_both_branches_of_every_step(make_pipeline, record_calls, generators):
    pipe = make_pipeline(guider=SparseGuidance(strong_ratio=0.25, weak_ratio=0.75))
    calls, plans = record_calls(pipe.transformer)
    pipe([1, 4], num_inference_steps=3, generator=generators(0, 1))
    assert [call[2].tolist() for call in calls] == [[1, 4]] * 10
    assert [ids[0].shape[1] for ids in plans] == [12, 4] * 5
    assert pipe.guidance_scale is None


def test_subsets_are_new_in_every_branch_step_and_sample(make_pipeline, record_calls, generators):
    pipe = make_pipeline(guider=SparseGuidance(strong_ratio=0.5, weak_ratio=0.55))  # both keep 8 of 16 tokens
    _, plans = record_calls(pipe.transformer)
    pipe([1, 4, 0], num_inference_steps=3, generator=generators(0, 1, 2))
    assert len({tuple(row.tolist()) for ids in plans for row in ids[0]}) == 5 * 2 * 3


def test_start_and_stop_are_shares_of_the_model_calls(make_pipeline, record_calls):
    pipe = make_pipeline(guider=SparseGuidance(start=0.2, stop=0.6))
    _, plans = record_calls(pipe.transformer)
    pipe(1, num_inference_steps=3)  # calls 0 to 4, of which 1 and 2 are guided: two branches each
    assert [plan is not None for plan in plans] == [False, True, True, True, True, False, False]


def test_guidance_scale_replaces_the_guider_for_one_call(make_pipeline, record_calls):
    pipe = make_pipeline(guider=SparseGuidance())
    calls, plans = record_calls(pipe.transformer)
    pipe(1, num_inference_steps=1, guidance_scale=2.0)
    assert [call[2].tolist() for call in calls] == [[1, 5]] and plans == [None]


def test_diffusers_classifier_free_guider_equals_guidance_scale(make_pipeline, generators):
    pipe = make_pipeline()
    plain = latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=2.5)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=2.5)
    torch.testing.assert_close(latents_of(pipe, [1, 4], generators(0, 1)), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "guider_class", [AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance, TangentialClassifierFreeGuidance]
)
def test_other_guiders_of_diffusers_guide(make_pipeline, record_calls, generators, guider_class):
    pipe = make_pipeline(guider=guider_class(guidance_scale=2.5))
    unguided = latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=1.0)
    calls, _ = record_calls(pipe.transformer)
    images = latents_of(pipe, [1, 4], generators(0, 1))
    assert [call[2].tolist() for call in calls] == [[1, 4, 5, 5]] * 5  # dense branches are one forward
    assert images.isfinite().all() and (images - unguided).abs().max() > 0.05


class OneByOne(ClassifierFreeGuidance):
    """Might change the model between its branches, which therefore cannot be one forward."""

    def prepare_models(self, denoiser):
        super().prepare_models(denoiser)


@pytest.mark.parametrize("seeds", ["one", "each"])
def test_branches_in_one_forward_equal_branches_one_by_one(make_pipeline, record_calls, generators, seeds):
    pipe, images = make_pipeline(), []
    for selection_ratio, size in ((None, 4), (0.5, 2)):  # of a routed model they stay apart, each with its own subset
        for guider in (ClassifierFreeGuidance, OneByOne):
            pipe.guider = guider(guidance_scale=2.5)
            calls, _ = record_calls(pipe.transformer)
            source = generators(0, 1) if seeds == "each" else generators(0)[0]
            with token_routing(pipe.transformer, selection_ratio=selection_ratio):
                images.append(latents_of(pipe, [1, 4], source))
            assert {len(call[0]) for call in calls} == {size if guider is ClassifierFreeGuidance else 2}
    assert difference(images[0], images[1]) < rounding(5 * 6 * 160)  # five calls of six blocks of width 16
    assert torch.equal(images[2], images[3]) and (images[2] - images[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings", [{"seed": torch.tensor([1, 2])}, {"seed": 1, "force_keep": torch.arange(32).view(2, 16) % 5 == 0}]
)
def test_settings_per_sample_hold_in_both_halves_of_classifier_free_guidance(make_pipeline, generators, settings):
    pipe, images = make_pipeline(), []
    with token_routing(pipe.transformer, selection_ratio=0.5, **settings):
        for guider in (None, OneByOne(guidance_scale=2.5)):
            pipe.guider = guider
            scale = {"guidance_scale": 2.5} if guider is None else {}
            images.append(latents_of(pipe, [1, 4], generators(0, 1), **scale))
    assert difference(*images) < rounding(5 * 6 * 160)


# The guidance transformer.


@pytest.mark.parametrize("kind", ["SG", "CFG", "AG"])
def test_the_guidance_transformer_runs_only_where_it_is_asked_for(make_guided, make_transformer, record_calls, kind):
    pipe = make_guided(KINDS[kind][0])
    pipe.guidance_transformer = make_transformer(num_attention_heads=1)
    calls, _ = record_calls(pipe.guidance_transformer)
    pipe([1, 4], num_inference_steps=3)
    assert [call[2].tolist() for call in calls] == ([[1, 4]] * 5 if kind == "AG" else [])
    calls.clear()
    pipe([1, 4], num_inference_steps=3, guidance_scale=2.0)
    assert calls == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"in_channels": 4}, r"the transformer's in_channels \(3\), got 4.*earlier checkpoint of the same"),
        ({"num_classes": 7}, r"num_classes \(5\), got 7"),
        ({"patch_size": 1}, r"patch_size \(2\), got 1"),
        ({"objective": "flow"}, r"objective \('edm'\), got 'flow'"),
        ({"out_channels": 6}, "out_channels=6"),
    ],
    ids=str,
)
def test_a_guidance_transformer_of_another_kind_is_refused(make_pipeline, make_transformer, settings, message):
    settings = {"objective": "edm"} | settings
    main, other = make_transformer(objective="edm"), make_transformer(**settings)
    with pytest.raises(ValueError, match=message):
        make_pipeline(transformer=main, guidance_transformer=other)

    # One put in later is checked by the call.
    pipe = make_pipeline(transformer=main)
    pipe.guidance_transformer = other
    with pytest.raises(ValueError, match=message):
        pipe(0, num_inference_steps=1)


def test_a_guider_that_needs_a_guidance_transformer_says_so_before_any_work(make_pipeline, record_calls):
    pipe = make_pipeline(guider=KINDS["AG"][0])
    calls, _ = record_calls(pipe.transformer)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match="Give the pipeline guidance_transformer="):
        pipe(0, num_inference_steps=1, generator=generator)
    assert calls == [] and torch.equal(generator.get_state(), before)
    assert len(pipe(0, num_inference_steps=1, guidance_scale=1.5).images) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_both_transformers_as_they_were(make_guided, out_of_memory, fails):
    pipe = make_guided(KINDS["SG_FID"][0])
    models = [pipe.transformer, pipe.guidance_transformer.train()]
    routers = [get_token_router(model) for model in models]
    routers[1].defaults = RoutingCall(selection_ratio=0.3)
    before = [(router.routes, router.defaults, router._surroundings.calls) for router in routers]

    if fails:
        out_of_memory(pipe.guidance_transformer)
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        pipe([1, 4], num_inference_steps=3)
    assert [(router.routes, router.defaults, router._surroundings.calls) for router in routers] == before
    assert [model.training for model in models] == [False, True]


def test_offloading_keeps_both_transformers_while_they_take_turns(make_guided, make_vae, generators):
    pytest.importorskip("accelerate")
    pipe = make_guided(KINDS["AG+SG"][0])
    pipe.vae = make_vae("kl")
    expected = latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks of a GPU, with the CPU in its place
    before = {id(hook.model): hook.hook.prev_module_hook for hook in pipe._all_hooks}
    assert before[id(pipe.transformer)] is before[id(pipe.guidance_transformer)] is None  # neither sends one away
    assert before[id(pipe.vae)].model is pipe.transformer
    assert torch.equal(latents_of(pipe, [1, 4], generators(0, 1), output_type="pt"), expected)


# Compilation.


def test_compiled_blocks_serve_every_ratio_of_a_schedule(make_guided, generators, counters):
    pipe = make_guided(None, FlowMatchEulerDiscreteScheduler(), sample_size=16)
    pipe.guider = SparseGuidance(strong_ratio=0.1, weak_ratio=RatioSchedule(first=0.8, last=0.2))
    expected = latents_of(pipe, [1, 4], generators(0, 1), num_inference_steps=12)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    images = latents_of(pipe, [1, 4], generators(0, 1), num_inference_steps=12)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert counters["unique_graphs"] == 2  # one size, then any size


# On disk.


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_pipeline_guides_as_before(make_guided, generators, tmp_path, kind):
    pipe = make_guided(KINDS[kind][0])
    expected = latents_of(pipe, [1, 4], generators(0, 1))
    pipe.save_pretrained(tmp_path)
    loaded = TREADPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded, [1, 4], generators(0, 1)), expected)
    assert (loaded.guidance_transformer is None) == (pipe.guidance_transformer is None)
    assert type(loaded.guider) is type(pipe.guider) and loaded.guider.guidance_scale == pipe.guider.guidance_scale


def test_a_guidance_transformer_can_be_given_while_loading(make_guided, make_pipeline, generators, tmp_path):
    pipe = make_guided(KINDS["AG"][0])
    expected = latents_of(pipe, [1, 4], generators(0, 1))
    make_pipeline(transformer=pipe.transformer).save_pretrained(tmp_path)

    # Also into a folder of a release that had no such component.
    index = json.loads((tmp_path / "model_index.json").read_text())
    for is_known in (True, False):
        if not is_known:
            del index["guidance_transformer"]
            (tmp_path / "model_index.json").write_text(json.dumps(index))
            assert TREADPipeline.from_pretrained(tmp_path).guidance_transformer is None
        loaded = TREADPipeline.from_pretrained(
            tmp_path, guider=pipe.guider, guidance_transformer=pipe.guidance_transformer
        )
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(loaded, [1, 4], generators(0, 1)), expected)


def test_a_guidance_transformer_put_in_later_is_saved_and_cast(make_pipeline, make_transformer, tmp_path):
    pipe = make_pipeline(guider=KINDS["AG"][0])
    pipe.guidance_transformer = make_transformer(num_attention_heads=1)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "guidance_transformer" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = TREADPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.guidance_transformer.dtype == torch.bfloat16
    assert loaded.guidance_transformer.config.num_attention_heads == 1
    assert len(loaded(0, num_inference_steps=2).images) == 1
