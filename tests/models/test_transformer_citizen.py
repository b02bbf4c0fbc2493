# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What diffusers offers its own transformers: caches, guiders that hook blocks, LoRA names, parallelism, export."""

import copy
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    PyramidAttentionBroadcastConfig,
    SkipLayerGuidance,
)
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

from diffusers_tread import RoutingCall, SparseGuidance, TREADPipeline, TREADTransformer2DModel


pytestmark = pytest.mark.filterwarnings("ignore:The route ends at block")


# Caches. Later releases have more of them.
CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=2.0),
    "pyramid attention broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}  # fmt: skip
if hasattr(diffusers, "TaylorSeerCacheConfig"):
    CACHES["TaylorSeer"] = lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1
    )
if hasattr(diffusers, "MagCacheConfig"):
    CACHES["MagCache"] = lambda: diffusers.MagCacheConfig(
        threshold=0.2, max_skip_steps=2, num_inference_steps=8, mag_ratios=torch.ones(8)
    )


@pytest.fixture
def sample(make_model):
    """A model, and a function that samples it."""
    model = make_model(objective="flow").eval()

    def sample(guider=None):
        pipe = TREADPipeline(model, FlowMatchEulerDiscreteScheduler(), guider=guider)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe([1, 2], num_inference_steps=8, generator=generators, output_type="latent").images

    return model, sample


@pytest.mark.parametrize(
    "guider",
    [None, ClassifierFreeGuidance(2.0), ClassifierFreeGuidance(2.0, stop=0.5)],
    ids=["unguided", "CFG", "CFG that ends"],
)
@pytest.mark.parametrize("cache", CACHES)
def test_caches_skip_work_and_leave_no_trace(sample, cache, guider):
    model, sample = sample
    expected, runs = sample(guider), []
    for block in model.transformer_blocks:
        block.attn.to_out[0].register_forward_hook(lambda *_: runs.append(1))
    model.enable_cache(CACHES[cache]())
    cached = sample(guider)
    assert 0 < len(runs) < 8 * len(model.transformer_blocks)
    again = sample(guider)
    handle = model.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(guider)
    handle.remove()
    assert torch.equal(cached, sample(guider))  # nor from one that failed
    model.disable_cache()
    assert torch.equal(cached, again)  # nothing is left from one call for the next
    assert 0 < (cached - expected).norm() < 0.5 * expected.norm()
    assert torch.equal(sample(guider), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_routed_branches_with_a_cache_are_refused_before_any_work(sample, cache):
    model, sample = sample
    expected, calls = sample(SparseGuidance()), []
    model.enable_cache(CACHES[cache]())
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="Expected a model without a cache.*disable_cache"):
        sample(SparseGuidance())
    assert calls == []
    with pytest.raises(ValueError, match="Expected a model without a cache"):
        model(torch.randn(1, 3, 8, 8), 0.5, routing=RoutingCall(enabled=True))
    config, model._cache_config = model._cache_config, None  # as diffusers' functions `apply_...` leave the model
    with pytest.raises(ValueError, match="Expected a model without a cache"):
        model(torch.randn(1, 3, 8, 8), 0.5, routing=RoutingCall(enabled=True))
    model._cache_config = config
    handle.remove()
    model.disable_cache()
    assert torch.equal(sample(SparseGuidance()), expected)


def skipped_layers(**settings):
    config = LayerSkipConfig(indices=[3], fqn="transformer_blocks")
    return SkipLayerGuidance(
        guidance_scale=1.5, skip_layer_guidance_scale=2.0, skip_layer_config=config,
        skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, **settings,
    )  # fmt: skip


def test_branches_that_run_one_by_one_do_not_meet_in_a_cache(sample):
    """Between the branches of one step a cache of the first block would find less change than it allows."""
    (model, sample), guider = sample, skipped_layers(stop=0.5)  # whose second branch is another one then
    expected = sample(guider)
    contexts, cache_context = [], TREADTransformer2DModel.cache_context

    def recorded(self, name, **kwargs):
        contexts.append(name)
        return cache_context(self, name, **kwargs)

    model.cache_context = recorded.__get__(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(guider), expected)
    assert contexts[2:5] == ["pred_cond", "pred_uncond", "pred_cond_skip"]
    assert contexts[-2:] == ["pred_cond", "pred_cond_skip"]


# Guiders that hook blocks.


def perturbed_attention():
    config = LayerSkipConfig(
        indices=[3], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    return PerturbedAttentionGuidance(
        guidance_scale=1.5, perturbed_guidance_scale=2.0, perturbed_guidance_config=config,
        perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("make_guider", [skipped_layers, perturbed_attention])
def test_guiders_that_hook_blocks_guide_and_leave_the_model_as_it_was(sample, make_guider):
    _, sample = sample
    expected = sample(ClassifierFreeGuidance(1.5))
    guided = sample(make_guider())
    assert guided.isfinite().all() and (guided - expected).norm() > 1e-3 * expected.norm()
    assert torch.equal(sample(ClassifierFreeGuidance(1.5)), expected)


# LoRA.


def test_targets_that_reach_nothing_are_said(make_model):
    peft = pytest.importorskip("peft")
    for targets in (["to_q", "to_k", "to_v", "to_out.0"], ["attn.to_q", "attn.to_out.0"], r".*\.(to_q|to_out\.0)"):
        with pytest.warns(UserWarning, match="neither query, key nor value.*to_qkv"):
            make_model().add_adapter(peft.LoraConfig(target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = make_model()
        model.add_adapter(peft.LoraConfig(target_modules=["to_qkv", "to_out.0"]))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * len(model.transformer_blocks)


# Graphs.


@pytest.mark.long
@pytest.mark.parametrize(
    ("routed", "sizes", "graphs"),
    [
        (True, [(8, 12), (8, 8), (12, 8), (16, 16), (4, 20)], 1),  # 8 x 8 is that of training
        (False, [(12, 12), (8, 8), (8, 12), (4, 20)], 2),  # a first square image makes a graph for square ones
    ],
)
def test_few_graphs_serve_all_image_sizes(make_model, routed, sizes, graphs):
    torch._dynamo.reset()
    counters.clear()
    model = make_model(num_layers=3, routes=[{"start": 0, "end": 0}]).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    timestep, labels = torch.rand(2), torch.tensor([0, 1])
    for size in sizes:
        latents, routing = torch.randn(2, 3, *size), RoutingCall(enabled=routed, seed=3)
        with torch.no_grad():
            found = compiled(latents, timestep, labels, routing=routing).sample
            expected = model(latents, timestep, labels, routing=routing).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("strict", [False, True])
def test_a_routed_forward_is_exported_for_any_batch_size(make_model, strict):
    model, batch = make_model(), torch.export.Dim("batch")
    model.token_router.defaults = RoutingCall(selection_ratio=0.5, seed=3)
    inputs = [(torch.randn(size, 3, 8, 8), torch.rand(size), torch.zeros(size, dtype=torch.int64)) for size in (2, 5)]
    exported = torch.export.export(model, inputs[0], dynamic_shapes=({0: batch},) * 3, strict=strict)
    torch.testing.assert_close(exported.module()(*inputs[1]).sample, model(*inputs[1]).sample)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_an_unseeded_routed_forward_can_be_packaged(make_model, tmp_path):
    sizes = {"num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 4, "mlp_ratio": 1.0}
    model = make_model(**sizes, routes=[{"start": 0, "end": 0}]).train()
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with torch.no_grad():
        exported = torch.export.export(model, inputs, strict=True)
        quick = {"aot_inductor.debug_compile": True}  # without optimisation
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
        )
        loaded = torch._inductor.aoti_load_package(package)
        samples = [loaded(*inputs)[0] for _ in range(3)]
    assert all(sample.shape == (2, 3, 8, 8) and sample.isfinite().all() for sample in samples)
    assert not torch.equal(samples[0], samples[1])  # each call draws a subset of its own


# Parallelism.


def run_in_parallel(rank, file):
    """One of two processes that share the tokens of a dense forward (Ulysses), and the weights (FSDP)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 2  # diffusers counts accelerators; these are CPUs
    torch.manual_seed(0)
    for options in ({}, {"positions": "rope", "value_residual": True}):
        model = TREADTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, num_layers=6, sample_size=8, num_classes=5, **options
        ).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        inputs = torch.randn(2, 4, 8, 8), torch.randn(2), torch.tensor([1, 2])
        with torch.no_grad():
            expected, unparallel = model(*inputs).sample, copy.deepcopy(model)
            model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
            torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-6, rtol=1e-5)
            with pytest.raises(ValueError, match="Expected a model without context parallelism in a routed forward"):
                model(*inputs, routing=RoutingCall(enabled=True, seed=1))

    # FSDP: a block's weights are whole in its forward alone, also where it makes the first values of all.
    gradients = []
    for shards in (False, True):
        model = copy.deepcopy(unparallel).train()
        for module in [*model.transformer_blocks, model] if shards else []:
            fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        if shards:
            model.enable_gradient_checkpointing()
        model(*inputs, routing=RoutingCall(seed=1)).sample.square().mean().backward()
        gradients.append([p.grad.full_tensor() if shards else p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_tokens_of_a_dense_forward_or_the_weights_of_a_routed_one(tmp_path):
    torch.multiprocessing.start_processes(run_in_parallel, (tmp_path / "init",), nprocs=2, start_method="fork")


# Threads.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_requests_in_threads_share_a_model_and_leave_it_as_it_was(sample, checkpointing):
    model, sample = sample
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    latents, timestep, labels = torch.randn(3, 3, 8, 8), torch.randn(3), torch.tensor([0, 5, 2])

    def gradient(seed):
        """Of a routed training step, for the latents: those of the weights are one model's."""
        x = latents.clone().requires_grad_()
        loss = model(x, timestep, labels, routing=RoutingCall(seed=seed)).sample.square().mean()
        return torch.autograd.grad(loss, x)[0]

    guiders = [SparseGuidance(), SparseGuidance(strong_ratio=0.5, weak_ratio=0.75), None]
    alone = [sample(guider) for guider in guiders] + [gradient(3), gradient(4)]
    before = {name: value for name, value in vars(model).items() if name != "_modules"}
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def work(index):
        if index < 3:
            return sample(guiders[index].new() if guiders[index] is not None else None)
        return gradient(index)

    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(work, list(range(5)) * 3))
    for index, result in enumerate(results):
        assert torch.equal(result, alone[index % 5]), index
    assert {name: value for name, value in vars(model).items() if name != "_modules"} == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
