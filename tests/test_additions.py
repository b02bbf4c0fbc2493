# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A stranger adds a backbone, an objective, a term of the loss, a guider, a metric, an optimiser, a block or data by
one file with one line that registers it: `additions/` holds one of each, and each goes through the package's own paths
here."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from diffusers_tread import (
    FlowMatchingObjective,
    RoutingCall,
    SparseGuidance,
    TokenRoute,
    TREADPipeline,
    TREADTransformer2DModel,
    apply_token_routing,
    check_token_routing,
    register_denoiser,
    register_guider,
    register_loss_term,
    register_objective,
    token_routing,
)
from diffusers_tread.data import SOURCES, register_source
from diffusers_tread.flops import flop_ceiling, forward_flops, guidance_flops
from diffusers_tread.guiders.registry import GUIDERS
from diffusers_tread.hooks.specs.blocks import BLOCK_SPECS
from diffusers_tread.hub import export_for_hub
from diffusers_tread.metrics import METRICS, FeatureExtractor, evaluate_pipeline, prepare_reference, register_metric
from diffusers_tread.models.registry import DENOISERS, make_denoiser
from diffusers_tread.objectives.registry import OBJECTIVES
from diffusers_tread.objectives.terms.registry import LOSS_TERMS
from diffusers_tread.runs.optimizers import OPTIMIZERS, register_optimizer


TABLES = (BLOCK_SPECS, DENOISERS, GUIDERS, LOSS_TERMS, METRICS, OBJECTIVES, OPTIMIZERS, SOURCES)
before = [set(table) for table in TABLES]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]

import train_tread  # noqa: E402
from additions import backbone, block_spec, guider, loss_term, metric, objective, optimizer, source  # noqa: E402, F401


# Other tests see the tables as they were.
ADDED = [{name: table.pop(name) for name in set(table) - names} for table, names in zip(TABLES, before, strict=True)]

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for table, added in zip(TABLES, ADDED, strict=True):
        for name, value in added.items():
            monkeypatch.setitem(table, name, value)


@pytest.fixture
def train(tmp_path, fresh_accelerate):
    """Runs the training script on the digits; gives the pipeline it saved."""

    def train(*flags, model):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(model))
        argv = ["--output_dir", tmp_path / "run", "--max_train_steps", 4, "--model_config_name_or_path", path]
        argv += ["--checkpointing_steps=2", "--validation_steps=4", "--num_validation_images=2", "--report_to=none"]
        train_tread.main([*map(str, [*argv, *flags])])
        pipe = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return train


def sample(pipe, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {"num_inference_steps": 3, "generator": generators, "output_type": "latent"} | settings
    return pipe([3, 5], **settings).images


def test_a_backbone_trains_resumes_samples_and_is_exported(train, tmp_path):
    model = {"_class_name": "MeanDenoiser", "routes": [{"start": 1, "end": 3}]}
    weights = train(model=model).transformer.state_dict()
    for name in ("pipeline", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    pipe = train(model=model)
    assert type(pipe.transformer) is backbone.MeanDenoiser
    assert weights.keys() == pipe.transformer.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.transformer.state_dict().items())

    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    # Sparse Guidance with and without the shared prefix, in a batch and alone.
    pipe.guider = SparseGuidance()
    images = sample(pipe)
    backbone.MeanDenoiser._supports_prefix = False
    try:
        assert torch.equal(sample(pipe), images)
    finally:
        backbone.MeanDenoiser._supports_prefix = True
    alone = pipe(5, num_inference_steps=3, generator=[torch.Generator().manual_seed(2)], output_type="latent").images
    torch.testing.assert_close(alone, images[1:], atol=1e-5, rtol=1e-4)
    assert flop_ceiling(pipe.transformer) > 1.2 and guidance_flops(pipe.transformer, pipe.guider).share_of_cfg < 1

    folder = export_for_hub(pipe, tmp_path / "hub")
    assert json.loads((folder / "model_index.json").read_text())["transformer"] == ["backbone", "MeanDenoiser"]
    loaded = TREADPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), images)
    assert "\nfrom diffusers_tread" not in (folder / "transformer/backbone.py").read_text()


def test_an_export_takes_the_code_of_a_guider_with_it(tmp_path):
    transformer = TREADTransformer2DModel(**TINY, sample_size=8, in_channels=1, objective="flow")
    pipe = TREADPipeline(transformer, FlowMatchEulerDiscreteScheduler(), guider=guider.TwoWeakBranches())
    folder = export_for_hub(pipe, tmp_path / "hub")
    assert "\nfrom diffusers_tread" not in (folder / "guider/guider.py").read_text()
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded.guider).__module__.startswith("diffusers_modules")


@pytest.mark.parametrize("kind", ["guider of a script", "objective"])
def test_what_an_export_cannot_take_with_it_is_refused(monkeypatch, tmp_path, kind):
    name = "sample" if kind == "objective" else "flow"
    transformer = TREADTransformer2DModel(**TINY, sample_size=8, in_channels=1, objective=name)
    pipe = TREADPipeline(transformer, OBJECTIVES[name]().scheduler(), guider=guider.TwoWeakBranches())
    if kind != "objective":
        monkeypatch.setattr(guider.TwoWeakBranches, "__module__", "__main__")
    with pytest.raises(ValueError, match="Expected an objective of diffusers_tread|Expected a guider whose code"):
        export_for_hub(pipe, tmp_path / "hub")


def test_routed_tokens_of_a_backbone_keep_their_bits_and_positions_move_with_the_kept():
    torch.manual_seed(0)
    model = backbone.MeanDenoiser(routes=[{"start": 0, "end": 2}])
    tokens = torch.randn(2, 64, 16)
    arguments = torch.zeros(2, 16)
    (ids,) = model.token_router.plan(tokens, training=True, call=RoutingCall(seed=1))
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(args))
    plan = {"routes": model.token_router.routes, "kept_token_ids": [ids], "per_token": [model.positions]}
    out = model.blocks(tokens, arguments, **plan, hidden_states_at=(2,))
    (kept_tokens, _, kept_positions) = seen[0]
    assert kept_tokens.shape == (2, 32, 16) and out.hidden_states[2].shape == (2, 32, 16)
    for index in range(2):
        assert torch.equal(kept_positions[index], model.positions[0, ids[index]])

    # Until the route ends, a routed token is as it was: only blocks 3 to 5 have changed it.
    mask = torch.ones(2, 64, dtype=torch.bool).scatter(1, ids, False)
    rejoined = []
    model.blocks[3].register_forward_hook(lambda module, args, output: rejoined.append(args[0]))
    model.blocks(tokens, arguments, **plan)
    assert torch.equal(rejoined[0][mask], tokens[mask]) and not torch.equal(rejoined[0][~mask], tokens[~mask])


def test_an_objective_trains_and_samples(train):
    pipe = train("--objective", "sample", model=TINY)
    assert pipe.transformer.config.objective == "sample" and type(pipe.scheduler) is DDIMScheduler
    assert sample(pipe).isfinite().all()
    with pytest.raises(ValueError, match="for the transformer's objective 'sample'.*prediction_type 'sample'"):
        TREADPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler())


def test_a_loss_term_trains_and_counts(train):
    pipe = train("--loss_terms", '{"small_tokens": {"block": 2, "weight": 0.5}}', model=TINY)
    assert sample(pipe).isfinite().all()
    model, latents = TREADTransformer2DModel(**TINY, sample_size=8, objective="flow"), torch.randn(2, 4, 8, 8)
    flow, dense = FlowMatchingObjective(), RoutingCall(enabled=False)
    term = loss_term.SmallTokens.for_model(model, block=2, weight=0.5)
    plain, with_term = (
        flow.loss(model, latents, terms=terms, routing=dense, generator=torch.Generator().manual_seed(0))
        for terms in ((), (term,))
    )
    noised = flow.corrupt(latents, torch.Generator().manual_seed(0))
    output = model(noised.hidden_states, noised.timestep, routing=dense, hidden_states_at=(2,))
    expected = 0.5 * output.hidden_states[2].square().mean(dim=(1, 2))
    torch.testing.assert_close(with_term - plain, expected, atol=1e-5, rtol=1e-4)


def test_an_optimiser_trains(train, tmp_path):
    train("--optimizer", "sgd", "--learning_rate", 0.25, "--lr_scheduler", "constant", model=TINY)
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.bin", weights_only=True)
    (group,) = state["param_groups"]
    assert (group["lr"], group["momentum"], len(state["state"])) == (0.25, 0.9, len(group["params"]))


def test_a_guider_guides_is_counted_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = TREADTransformer2DModel(**TINY, sample_size=8, num_classes=10, objective="flow")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = TREADPipeline(model, FlowMatchEulerDiscreteScheduler(), guider=guider.TwoWeakBranches())
    pipe.set_progress_bar_config(disable=True)
    x, seed = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with token_routing(model, seed=seed):
        images = sample(pipe, latents=x, sigmas=[1.0])
    with torch.no_grad():
        strong = model(x, 1000.0, torch.tensor([3, 5]), routing=RoutingCall(enabled=False)).sample
        routed = model(
            x, 1000.0, torch.tensor([3, 5]), routing=RoutingCall(enabled=True, selection_ratio=0.5, seed=seed)
        ).sample
        null = model(x, 1000.0, torch.tensor([10, 10]), routing=RoutingCall(enabled=False)).sample
    weak = (routed + null) / 2
    torch.testing.assert_close(images, x - (weak + 1.5 * (strong - weak)), atol=1e-5, rtol=1e-5)

    dense, half = (forward_flops(model, selection_ratio=ratio).total for ratio in (0.0, 0.5))
    counted = guidance_flops(model, pipe.guider, num_steps=1, shared_prefix=False).total
    assert counted == 2 * dense + half > guidance_flops(model, pipe.guider, num_steps=1).total

    pipe.save_pretrained(tmp_path)
    loaded = TREADPipeline.from_pretrained(tmp_path)
    assert type(loaded.guider) is guider.TwoWeakBranches
    loaded.set_progress_bar_config(disable=True)
    with token_routing(loaded.transformer, seed=seed):
        assert torch.equal(sample(loaded, latents=x, sigmas=[1.0]), images)


def test_a_metric_is_computed_for_a_pipeline(tmp_path):
    class Means(FeatureExtractor):
        """The mean of each channel in 0..1."""

        def __init__(self):
            super().__init__(torch.nn.Identity(), name="means", outputs=("features",), settings={})

        def extract(self, images):
            return {"features": images.float().mean(dim=(2, 3)) / 255}

    transformer = TREADTransformer2DModel(**TINY, in_channels=3, sample_size=8, num_classes=10, objective="flow")
    pipe = TREADPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = np.full((8, 8, 8, 3), 51, dtype=np.uint8)  # 0.2 in each channel
    images[::2] += 2
    np.savez(tmp_path / "reference.npz", arr_0=images)
    settings = {"extractor": Means(), "batch_size": 4}
    reference = prepare_reference(
        tmp_path / "reference.npz", metrics=("mean_distance",), store_dir=tmp_path / "store", image_size=(8, 8),
        **settings,
    )  # fmt: skip
    values = evaluate_pipeline(
        pipe, reference=reference, num_samples=8, num_inference_steps=1, guidance_scale=1.0, seed=0,
        store_dir=tmp_path / "samples", **settings,
    )  # fmt: skip
    assert set(values) == {"mean_distance"} and 0.3 < values["mean_distance"] < 0.8


def test_a_block_is_routed_with_what_belongs_to_its_tokens():
    torch.manual_seed(0)
    model = block_spec.TurningModel()
    apply_token_routing(model, TokenRoute(start=1, end=-4))
    tokens, state, frozen = torch.randn(2, 16, 8), torch.get_rng_state(), model.blocks[0].eval()
    assert check_token_routing(model, tokens=tokens) < 1e-5
    assert model.training and not frozen.training and torch.equal(torch.get_rng_state(), state)
    model.train()
    model(torch.randn(2, 16, 8)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_forwards_of_one_input_stay_apart_under_torchs_checkpoints():
    found = []
    for wrapper in (torch.nn.Identity(), checkpoint_wrapper):
        torch.manual_seed(0)
        model = block_spec.TurningModel()
        apply_token_routing(model, TokenRoute(start=0, end=-4))
        model.blocks = torch.nn.ModuleList(wrapper(block) for block in model.blocks)
        tokens = torch.randn(2, 16, 8)  # the model's input is its first block's
        calls = RoutingCall(seed=1), RoutingCall(seed=2), RoutingCall(enabled=False)
        sum(model(tokens, routing=call).square().mean() for call in calls).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_a_source_of_data_trains_resumes_and_names_its_classes(train, tmp_path):
    pipe = train("--data", "toy:40", model=TINY)
    assert pipe.config.id2label == {"0": "dark", "1": "light"} and pipe.transformer.config.in_channels == 3
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (settings["data"], settings["num_images"], settings["num_classes"]) == ("toy:40", 40, 2)
    for name in ("pipeline", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    again = train("--data", "toy:40", model=TINY)
    weights = again.transformer.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.transformer.state_dict().items())
    with pytest.raises(ValueError, match="Expected data as digits:NAME, .*toy:NAME, got 'toys:40'"):
        train("--data", "toys:40", model=TINY)


@pytest.mark.parametrize("kind", ["objective", "loss_term", "guider", "denoiser", "metric", "optimizer", "source"])
def test_a_name_is_not_taken_twice(kind):
    other = {
        "guider": type("TwoWeakBranches", (guider.TwoWeakBranches,), {}),
        "denoiser": type("MeanDenoiser", (backbone.MeanDenoiser,), {}),
    }
    calls = {
        "objective": lambda: register_objective("sample", type("Other", (objective.SampleObjective,), {})),
        "loss_term": lambda: register_loss_term("small_tokens", type("Other", (loss_term.SmallTokens,), {})),
        "guider": lambda: register_guider(other["guider"]),
        "denoiser": lambda: register_denoiser(other["denoiser"]),
        "metric": lambda: register_metric("mean_distance", METRICS["fid"]),
        "optimizer": lambda: register_optimizer("sgd", lambda config, model: optimizer.make_sgd(config, model)),
        "source": lambda: register_source("toy", source.Squares),
    }
    with pytest.raises(ValueError, match="Expected a new name"):
        calls[kind]()


def test_a_thing_has_one_name_and_a_preset_one_model():
    with pytest.raises(ValueError, match="Expected an objective without a name, got 'sample'"):
        register_objective("other", objective.SampleObjective)
    presets = {"presets": classmethod(lambda cls: ["S/2", "mine"])}
    with pytest.raises(ValueError, match=r"got \['S/2'\], those of TREADTransformer2DModel"):
        register_denoiser(type("Mine", (backbone.MeanDenoiser,), presets))
    with pytest.raises(ValueError, match="Expected a preset among .*or a class among .*TREADTransformer2DModel"):
        make_denoiser("S/3")
