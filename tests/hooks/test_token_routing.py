# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Settings, stacks, checkpoints, compilers, wrappers and errors of routing on unmodified models."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from types import SimpleNamespace

import pytest
import tiny_transformers
import torch
from diffusers import FirstBlockCacheConfig
from gradients import assert_same, gradients_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint

from diffusers_tread import (
    BlockSpec,
    ModelSpec,
    RoutingCall,
    SparseGuidance,
    TokenRoute,
    TokenRouter,
    TREADTransformer2DModel,
    Window,
    apply_token_routing,
    check_token_routing,
    compile_blocks,
    get_token_router,
    register_block_spec,
    register_model_spec,
    remove_token_routing,
    token_routing,
)
from diffusers_tread.hooks.specs import BLOCK_SPECS, MODEL_SPECS, REFUSED_BLOCKS


ROUTE = TokenRoute(start=1, end=-4)


def routed(name="FluxTransformer2DModel", route=ROUTE, **kwargs):
    case = tiny_transformers.build(name)
    apply_token_routing(case.model, route, **kwargs)
    case.model.train()
    return case


def flux():
    return tiny_transformers.build("FluxTransformer2DModel").model


def run(case):
    return case.model(**case.inputs, return_dict=False)[0]


def losses(case, seeds):
    """The sum of one loss per seed: several forwards before one backward."""
    total = 0.0
    for seed in seeds:
        with token_routing(case.model, seed=seed):
            total = total + run(case).square().mean()
    return total


def gradients(case, seeds=(1, 2)):
    case.model.zero_grad()
    losses(case, seeds).backward()
    return gradients_of(case.model)


# ------------------------------------------------------------------------------------------------------- our model


class PlainStack(torch.nn.ModuleList):
    """Blocks in a plain loop, as other people's models have them."""

    def forward(self, tokens, conditioning, **settings):
        for block in self:
            tokens = block(tokens, conditioning)
        return tokens, None, {}


@torch.no_grad()
def test_blockwise_routing_equals_the_inline_route_of_our_model_bitwise(monkeypatch):
    monkeypatch.setitem(BLOCK_SPECS, "TREADTransformerBlock", BlockSpec())
    monkeypatch.delitem(REFUSED_BLOCKS, "TREADTransformerBlock")
    config = {"num_layers": 8, "sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    inline = TREADTransformer2DModel(**config, routes=[ROUTE])
    tiny_transformers.randomise(inline)
    plain = TREADTransformer2DModel(**config, routes=None)
    plain.transformer_blocks = PlainStack(plain.transformer_blocks)
    plain.load_state_dict(inline.state_dict())
    apply_token_routing(plain, ROUTE)

    latents, timestep, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    outputs = []
    for model in (inline, plain):
        with token_routing(model.train(), seed=3):
            outputs.append(model(latents, timestep, labels).sample)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], inline.eval()(latents, timestep, labels).sample)


# ------------------------------------------------------------------------------------------------ router and stacks


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_a_call_says_what_token_routing_says(name):
    case = routed(name)
    for settings in ({"seed": 3}, {"enabled": False}, {"selection_ratio": 0.75, "seed": 5}):
        with token_routing(case.model, **settings):
            expected = run(case)
        found = case.model(**case.inputs, routing=RoutingCall(**settings))
        assert torch.equal(found[0] if not hasattr(found, "sample") else found.sample, expected)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_threads_share_a_model_and_leave_it_as_it_was(name):
    case = routed(name)
    case.model.enable_gradient_checkpointing()
    run(case)  # which wraps the checkpoint function
    before, state = dict(vars(case.model)), {name: value.clone() for name, value in case.model.state_dict().items()}
    settings = [{"seed": 1}, {"selection_ratio": 0.75, "seed": 2}, {"enabled": False}, {"selection_ratio": 0.25}]
    settings[3]["seed"] = torch.tensor([3, 4])

    def request(settings):
        """A loss and its gradient for the input, recomputed in the backward."""
        name = "hidden_states"
        latents = case.inputs[name].clone().requires_grad_()
        with token_routing(case.model, **settings):
            prediction = case.model(**case.inputs | {name: latents}, return_dict=False)[0]
            (gradient,) = torch.autograd.grad(prediction.square().mean(), latents)
        return prediction.detach(), gradient

    alone = [request(one) for one in settings]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(request, settings * 5))
    for index, (prediction, gradient) in enumerate(results):
        assert torch.equal(prediction, alone[index % 4][0]) and torch.equal(gradient, alone[index % 4][1])
    assert vars(case.model) == before
    assert all(torch.equal(state[name], value) for name, value in case.model.state_dict().items())


def test_a_routed_forward_with_a_cache_is_refused():
    case = routed("FluxTransformer2DModel")
    case.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="Expected a model without a cache in a routed forward.*disable_cache"):
        run(case)
    with token_routing(case.model, enabled=False), case.model.cache_context("cond"), torch.no_grad():
        run(case)
    case.model.disable_cache()
    run(case)


@torch.no_grad()
def test_each_forward_of_a_training_model_draws_a_fresh_subset():
    case = routed()
    assert not torch.equal(run(case), run(case))
    with token_routing(case.model, seed=0):
        assert torch.equal(run(case), run(case))


@torch.no_grad()
def test_tokens_that_are_forced_stay_in():
    case = routed("SD3Transformer2DModel")
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :8], mask[1, 8:] = True, True
    block, seen = case.model.transformer_blocks[2], []
    block.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"] == output[1]).all(dim=2)),
        with_kwargs=True,
    )
    with token_routing(case.model, force_keep=mask):
        run(case)
    assert torch.equal(seen[0], ~mask)


@torch.no_grad()
def test_a_shared_subset_is_the_same_for_all_samples():
    case = routed()
    get_token_router(case.model).defaults = RoutingCall(shared_subset=True)
    twins = {k: v[:1].expand_as(v) if v.shape[0] == 2 else v for k, v in case.inputs.items()}
    first, second = case.model(**twins, return_dict=False)[0]
    torch.testing.assert_close(first, second)
    get_token_router(case.model).defaults = RoutingCall()
    first, second = case.model(**twins, return_dict=False)[0]
    assert (first - second).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{"magnitude_mix": 0.9}, {"force_keep": torch.eye(16, dtype=torch.bool)[[0, 7]]}],
    ids=lambda s: [*s][0],
)
def test_subsets_that_differ_in_spite_of_a_shared_draw_have_rotary_rows_of_their_own(settings, monkeypatch):
    def sample(index=slice(None)):
        inputs = {k: v[index] if len(v) == 2 else v for k, v in case.inputs.items()}
        changed = {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        call = RoutingCall(seed=3, shared_subset=True, **changed)
        return case.model(**inputs, routing=call, return_dict=False)[0]

    case = routed()
    alone = torch.cat([sample(slice(0, 1)), sample(slice(1, 2))])
    torch.testing.assert_close(sample(), alone, atol=1e-5, rtol=1e-5)

    spec = dataclasses.replace(BLOCK_SPECS["FluxTransformerBlock"], needs_shared_subset=True)
    monkeypatch.setitem(BLOCK_SPECS, "FluxTransformerBlock", spec)
    case = routed()
    with pytest.raises(ValueError, match="Expected one subset for all samples"):
        sample()


def test_routes_count_all_main_stacks_or_one_named_stack():
    def wrapped(model):
        return [
            index
            for index, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks])
            if "forward" in block.__dict__ and block.forward.route_index is not None
        ]

    assert wrapped(routed(route=TokenRoute(start=1, end=4)).model) == [1, 2, 3, 4]  # 3 double, 5 single blocks
    assert wrapped(routed(route=TokenRoute(start=1, end=2), stack="single_transformer_blocks").model) == [4, 5]
    two = routed(route=[TokenRoute(start=0, end=1), TokenRoute(start=3, end=4, selection_ratio=0.75)])
    assert wrapped(two.model) == [0, 1, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("stack", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "FluxTransformer2DModel"])
@pytest.mark.filterwarnings("ignore:The route ends")
def test_one_stack_alone_can_be_routed(name, stack):
    """Flux 2's single blocks then learn the number of image tokens from a double block that is not routed."""
    case = routed(name, TokenRoute(start=0, end=-3), stack=stack)
    case.model.eval()
    dense = run(case)
    assert check_token_routing(case.model, **case.inputs) < 1e-5
    with token_routing(case.model, selection_ratio=0.5):
        assert not torch.equal(run(case), dense)


@torch.no_grad()
def test_magnitude_counts_in_the_choice(monkeypatch):
    case = routed("Lumina2Transformer2DModel")  # image tokens start at a different position in each sample
    router = get_token_router(case.model)
    router.defaults = RoutingCall(magnitude_mix=1.0)
    ids, plan = [], TokenRouter.plan

    def recorded(self, tokens, **kwargs):
        ids.append((tokens, plan(self, tokens, **kwargs)[0]))
        return [ids[-1][1]]

    monkeypatch.setattr(TokenRouter, "plan", recorded)
    run(case)
    tokens, kept = ids[0]
    expected = tokens.abs().sum(dim=2).topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(kept, expected)


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "PRXTransformer2DModel"])
def test_gradients_are_the_same_under_the_models_own_checkpoints(name, use_reentrant):
    case = routed(name)
    expected = gradients(case)
    case.model.enable_gradient_checkpointing(
        lambda function, *args: checkpoint(function.__call__, *args, use_reentrant=use_reentrant)
    )
    assert_same(gradients(case), expected)


def test_gradients_are_the_same_after_routing_is_switched_off_between_forward_and_backward():
    case = routed()
    expected = gradients(case)
    case.model.enable_gradient_checkpointing()
    loss = losses(case, (1, 2))
    with token_routing(case.model, enabled=False):
        case.model.zero_grad()
        loss.backward()
    assert_same(gradients_of(case.model), expected)


def wrap_blocks(model, wrapper):
    for stack in (model.transformer_blocks, getattr(model, "single_transformer_blocks", [])):
        for index, block in enumerate(stack):
            stack[index] = wrapper(block)


def checkpointed(block, kind=CheckpointImpl.NO_REENTRANT):
    return checkpoint_wrapper(block, checkpoint_impl=kind)


@pytest.mark.parametrize("wrapper", [checkpointed, offload_wrapper])
def test_gradients_are_the_same_under_torchs_wrappers(wrapper):
    expected, case = gradients(routed()), routed()
    wrap_blocks(case.model, wrapper)
    seen = []
    case.model.transformer_blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    assert_same(gradients(case), expected)
    assert seen and not any(vars(tensor) for tensor in seen)  # nothing is left on what may be the user's


def test_a_foreign_reentrant_checkpoint_is_refused_in_the_forward():
    case = routed()
    wrap_blocks(case.model, lambda block: checkpointed(block, CheckpointImpl.REENTRANT))
    with pytest.raises(RuntimeError, match="re-entrant checkpoint.*use_reentrant=False"):
        losses(case, (1,))


def test_a_recomputation_that_lost_its_forward_is_an_error():
    """Under hooks that copy saved tensors (offloading to another device) it gets other tensors than the forward."""
    case = routed("DiTTransformer2DModel")
    wrap_blocks(case.model, checkpointed)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss = losses(case, (1,))
    with pytest.raises(RuntimeError, match="called outside a forward of its model"):
        loss.backward()


@torch.no_grad()
def test_a_block_called_by_itself_is_an_error_while_routing_is_on():
    model = routed("SD3Transformer2DModel").model
    arguments = torch.randn(2, 16, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    with pytest.raises(RuntimeError, match="outside a forward of its model"):
        model.transformer_blocks[2](*arguments)
    with token_routing(model, enabled=False):
        model.transformer_blocks[2](*arguments)


# ---------------------------------------------------------------------------------------------------- compilers


def shortened(name):
    """The case with its last four blocks, which compile faster."""
    case = tiny_transformers.build(name)
    has_two_stacks = hasattr(case.model, "single_transformer_blocks")
    case.model.transformer_blocks = case.model.transformer_blocks[-2 if has_two_stacks else -4 :]
    if has_two_stacks:
        case.model.single_transformer_blocks = case.model.single_transformer_blocks[-2:]
    apply_token_routing(case.model, TokenRoute(start=1, end=1))
    case.model.train()
    return case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("DiTTransformer2DModel", False),
        ("SD3Transformer2DModel", False),
        ("FluxTransformer2DModel", False),
        ("FluxTransformer2DModel", True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_one_full_graph_trains_with_eager_gradients_and_a_fresh_subset_each_step(name, checkpointing):
    torch.compiler.reset()
    case = shortened(name)
    if checkpointing:
        case.model.enable_gradient_checkpointing()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = dataclasses.replace(case, model=torch.compile(case.model, fullgraph=True, backend=backend))
    outputs = []
    for seed in (1, 2):
        expected = gradients(case, (seed,))
        case.model.zero_grad()
        with token_routing(case.model, seed=seed):
            outputs.append(run(compiled))
        outputs[-1].square().mean().backward()
        assert_same(gradients_of(case.model), expected)
    assert not torch.equal(*outputs)
    assert len(graphs) == 1  # a new seed is not a new graph

    if name == "DiTTransformer2DModel":  # without a seed the graph draws its own
        with torch.no_grad():
            assert not torch.equal(run(compiled), run(compiled))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_train_with_eager_gradients():
    torch.compiler.reset()
    case = shortened("SD3Transformer2DModel")
    expected = gradients(case)
    compile_blocks(case.model, backend="aot_eager", fullgraph=True)
    assert case.model.transformer_blocks[1].forward.compiled is not None
    assert_same(gradients(case), expected)
    assert copy.deepcopy(case.model).transformer_blocks[1].forward.compiled is None


# ---------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("keep_wrapper", [False, True])
def test_accelerate_prepares_and_unwraps_a_routed_model(keep_wrapper):
    accelerate = pytest.importorskip("accelerate")
    case = routed()
    expected = gradients(case, (1,))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(case.model)
    with token_routing(prepared, seed=1):
        prepared(**case.inputs, return_dict=False)[0].float().square().mean().backward()
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep_wrapper)
    assert_same(gradients(dataclasses.replace(case, model=model), (1,)), expected, limit=0.2)  # in bfloat16
    if not keep_wrapper:
        assert_same(gradients(dataclasses.replace(case, model=copy.deepcopy(model)), (1,)), expected)
        remove_token_routing(model)
        assert "forward" not in model.transformer_blocks[2].__dict__


def test_removal_refuses_while_something_else_wraps_the_model():
    case = routed()
    inner = case.model.forward
    case.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="has been wrapped since"):
        remove_token_routing(case.model)
    case.model.forward = inner
    remove_token_routing(case.model)


def test_the_signature_of_the_model_is_that_of_its_class():
    assert signature(routed().model.forward) == signature(flux().forward)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_sparse_guidance_is_the_combination_of_two_routed_predictions(name):
    case = routed(name)
    router = get_token_router(case.model.eval())
    router.defaults = RoutingCall(seed=7)
    guider = SparseGuidance(guidance_scale=1.6, strong_ratio=0.25, weak_ratio=0.75)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1.0))

    batches = guider.prepare_inputs({"encoder_hidden_states": case.inputs["encoder_hidden_states"]})
    for batch in batches:
        guider.prepare_models(case.model)
        arguments = case.inputs | {"encoder_hidden_states": batch.encoder_hidden_states}
        batch.noise_pred = case.model(**arguments, return_dict=False)[0]
        guider.cleanup_models(case.model)
    guided = guider(batches)[0]

    predictions = []
    for ratio in (0.25, 0.75):
        with token_routing(case.model, selection_ratio=ratio):
            predictions.append(run(case))
    strong, weak = predictions
    torch.testing.assert_close(guided, 1.6 * strong - 0.6 * weak)
    assert not router.is_routing(training=False) and (strong - weak).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- errors


def with_wrapped_blocks():
    model = flux()
    wrap_blocks(model, checkpoint_wrapper)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routed().model, "has token routing already"),
        (lambda: torch.compile(flux()), "Give the transformer itself, not a wrapper"),
        (with_wrapped_blocks, "got CheckpointWrapper in FluxTransformer2DModel"),
    ],
)
def test_models_that_are_routed_or_wrapped_already_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        apply_token_routing(make(), ROUTE)


@pytest.mark.parametrize("function", [remove_token_routing, check_token_routing, compile_blocks])
def test_functions_for_routed_models_refuse_others(function):
    with pytest.raises(ValueError, match="Expected a model with apply_token_routing"):
        function(flux())


@pytest.mark.parametrize(
    ("routes", "stack", "message"),
    [
        (TokenRoute(start=1, end=7), None, "at least two blocks after the route"),
        (TokenRoute(start=1, end=4), "transformer_blocks", "inside the model's 3 blocks"),
        ([], None, "at least one route"),
        ({"start": 1, "end": 4, "rejoin": "sum"}, None, "rejoin='state' in the routes of Flux.*, got .*rejoin='sum'"),
        ({"start": 1, "end": 4, "rejoin": "fuse"}, None, "whose files have the weights of a fusion"),
        ({"start": 2, "end": 4, "rejoin_from": 1}, None, "routes of Flux.* and no rejoin_from, got .*rejoin_from=1"),
        (ROUTE, "no_blocks", r"such as \['transformer_blocks', 'single_transformer_blocks'\], got 'no_blocks'"),
        ("2-4", None, "Expected a TokenRoute"),
    ],
)
def test_bad_routes_are_refused_before_anything_changes(routes, stack, message):
    model = flux()
    with pytest.raises(ValueError, match=message):
        apply_token_routing(model, routes, stack=stack)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_spec_that_names_an_unknown_argument_is_refused(monkeypatch):
    monkeypatch.setitem(BLOCK_SPECS, "FluxTransformerBlock", BlockSpec(tokens={"rotary": 0}))
    with pytest.raises(ValueError, match=r"FluxTransformerBlock.forward to take \['rotary'\]"):
        apply_token_routing(flux(), ROUTE)


def test_a_wrong_spec_is_named_by_the_check(monkeypatch):
    spec = BlockSpec(output=1, tokens={}, text="first")
    monkeypatch.setitem(BLOCK_SPECS, "FluxSingleTransformerBlock", spec)
    case = routed()
    with pytest.raises(ValueError, match=r"not gathered in \['FluxSingleTransformerBlock'\]"):
        check_token_routing(case.model, **case.inputs)
    assert case.model.training


def hide_the_mask(model):
    """As flash backends, which get none: they count the window in tokens, of which some are missing."""
    assert model.layers[2].self_attn.sliding_window is not None
    model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )


def add_positions(model):
    model.transformer_blocks[2].pos_embed = torch.nn.Identity()


def parallelise(model):
    model._parallel_config = SimpleNamespace(context_parallel_config=object())


@pytest.mark.parametrize(
    ("name", "change", "inputs", "message"),
    [
        ("Flux", parallelise, {}, "without context parallelism"),
        ("PixArt", add_positions, {}, "adds positions to its tokens"),
        ("AceStep", hide_the_mask, {}, "counts a sliding window in tokens"),
        ("MiniMaxH3", None, {}, "Give shared_subset=True"),  # its blocks index by token
        ("ZImage", None, {"x": [torch.ones(4, 1, 8, width) for width in (8, 12)]}, r"image tokens, got \[16, 24\]"),
        ("Kandinsky5", None, {"sparse_params": {"to_fractal": False}}, "Expected `sparse_params` .* to be None"),
        ("Flux2", None, {"kv_cache_mode": "extract"}, "`kv_cache_mode` .* None in a routed forward: cached keys"),
    ],
)
def test_forwards_that_cannot_be_routed_are_refused(name, change, inputs, message):
    known = {full_name.split("Transformer")[0]: full_name for full_name in tiny_transformers.classes()}
    if name not in known:
        pytest.skip("this diffusers has no such model")
    case = routed(known[name], TokenRoute(start=0, end=-4))
    if change is not None:
        change(case.model)
    with pytest.raises(ValueError, match=message):
        case.model(**case.inputs | inputs)


# ---------------------------------------------------------------------------------------- other people's models


class MyBlock(torch.nn.Module):
    """Adds to each token the mean over all tokens, scaled by what the token's position says."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, states, positions):
        return states + self.linear(states).mean(dim=1, keepdim=True) * positions


class MyModel(torch.nn.Module):
    """A stream of one time token and the image tokens."""

    def __init__(self):
        super().__init__()
        self.my_blocks = torch.nn.ModuleList(MyBlock() for _ in range(8))

    def forward(self, image, time):
        states = torch.cat([time, image], dim=1)
        positions = torch.arange(states.shape[1]).view(1, -1, 1) / 10
        for block in self.my_blocks:
            states = block(states, positions)
        return states[:, 1:]


@pytest.fixture
def my_model():
    """`MyModel`, whose blocks are registered for as long."""
    register_block_spec("MyBlock", BlockSpec(hidden="states", tokens={"positions": 1}, text="first", joint=True))
    yield MyModel()
    BLOCK_SPECS.pop("MyBlock")
    MODEL_SPECS.pop("MyModel", None)


def test_models_and_blocks_of_others_can_be_registered(my_model):
    spec = ModelSpec(stacks=("my_blocks",), window=lambda model, arguments: Window(1, arguments["image"].shape[1]))
    register_model_spec("MyModel", spec)
    apply_token_routing(my_model, ROUTE)
    assert check_token_routing(my_model, image=torch.randn(2, 6, 4), time=torch.randn(2, 1, 4)) < 1e-5
    assert my_model(torch.randn(2, 6, 4), torch.randn(2, 1, 4)).shape == (2, 6, 4)


def test_a_joint_stream_whose_image_part_nobody_tells_is_refused(my_model):
    apply_token_routing(my_model, ROUTE, stack="my_blocks")
    with pytest.raises(ValueError, match="mixes text and image tokens.*register_model_spec"):
        my_model(torch.randn(2, 6, 4), torch.randn(2, 1, 4))
