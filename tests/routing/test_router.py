# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The router: when it routes, what it keeps, and that nothing it was lent is left changed."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn

from diffusers_tread import RoutingCall, TokenRoute, TokenRouter, get_token_router, token_routing
from diffusers_tread.routing import draw_routing_seed
from diffusers_tread.routing.subset import random_priority, select_kept_tokens, subset_hashes


TOKENS = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))


def make_router(routes=((2, 5, 0.5),), **defaults):
    routes = [TokenRoute(start=start, end=end, selection_ratio=ratio) for start, end, ratio in routes]
    router = TokenRouter(routes, num_layers=12)
    router.defaults = RoutingCall(**defaults)
    return router


class Denoiser(nn.Module):
    """The least a routed denoiser is: a module with a router."""

    def __init__(self, routes=((2, 5, 0.5),)):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.token_router = make_router(routes)

    def forward(self, tokens):
        ids = self.token_router.plan(tokens, training=self.training)
        return self.proj(tokens), ids


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# When a forward is routed.


def test_training_routes_and_evaluation_is_dense():
    router = make_router()
    assert router.plan(TOKENS, training=False) is None
    (ids,) = router.plan(TOKENS, training=True)
    assert ids.shape == (4, 10) and ids.dtype == torch.int64


@pytest.mark.parametrize("training", [False, True])
def test_enabled_overrides_the_mode(training):
    router = make_router(enabled=True)
    assert router.plan(TOKENS, training=training)[0].shape == (4, 10)
    router.defaults = RoutingCall(enabled=False)
    assert router.plan(TOKENS, training=training) is None
    router.defaults = RoutingCall(enabled=False, selection_ratio=0.3)
    assert router.plan(TOKENS, training=training) is None


@pytest.mark.parametrize("training", [False, True])
def test_a_ratio_override_routes_in_both_modes(training):
    router = make_router([(1, 2, 0.5), (4, 6, 0.25)], selection_ratio=0.7)
    assert [ids.shape[1] for ids in router.plan(TOKENS, training=training)] == [6, 6]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enabled", [None, True])
def test_ratio_zero_is_dense(training, enabled):
    router = make_router(enabled=enabled, selection_ratio=0.0)
    assert router.plan(TOKENS, training=training) is None
    assert make_router([(2, 5, 0.0)]).plan(TOKENS, training=training) is None


def test_each_route_keeps_its_own_share_and_subset():
    first, second, third = make_router([(1, 2, 0.5), (4, 6, 0.0), (7, 8, 0.5)]).plan(TOKENS, training=True)
    assert second is None
    assert first.shape == third.shape == (4, 10)
    assert not torch.equal(first, third)


def test_a_ratio_too_small_to_route_a_token_is_dense():
    assert make_router([(2, 5, 0.04)]).plan(TOKENS, training=True) is None
    assert make_router([(2, 5, 0.05)]).plan(TOKENS, training=True)[0].shape == (4, 19)


def test_a_model_without_routes_never_routes():
    router = TokenRouter(None, num_layers=3)
    router.defaults = RoutingCall(enabled=True, selection_ratio=0.5)
    assert router.routes == () and router.plan(TOKENS, training=True) is None


# Randomness.


def test_without_a_seed_every_forward_has_a_fresh_subset_from_torchs_generator():
    router = make_router()
    torch.manual_seed(3)
    plans = [router.plan(TOKENS, training=True) for _ in range(3)]
    assert not equal(plans[0], plans[1]) and not equal(plans[1], plans[2])
    torch.manual_seed(3)
    assert equal(router.plan(TOKENS, training=True), plans[0])


def test_a_generator_decides_alone_and_advances_once_per_forward():
    router = make_router([(1, 2, 0.5), (4, 6, 0.5)], generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    plans = [router.plan(TOKENS, training=True) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(*plans)

    seeds = [torch.randint(0, 2**62, (), generator=g) for g in [torch.Generator().manual_seed(5)] for _ in range(2)]
    router.defaults = RoutingCall(generator=None)
    for seed, plan in zip(seeds, plans, strict=True):
        router.defaults = RoutingCall(seed=seed)
        assert equal(router.plan(TOKENS, training=True), plan)


def test_a_dense_forward_draws_nothing():
    state = torch.get_rng_state()
    make_router().plan(TOKENS, training=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_fixes_the_subset_and_is_not_advanced():
    router = make_router(seed=9)
    first = router.plan(TOKENS, training=True)
    assert equal(router.plan(TOKENS, training=True), first)
    hashes = subset_hashes(torch.tensor(9), route_index=0, batch_size=4, num_tokens=20)
    assert torch.equal(first[0], select_kept_tokens(random_priority(hashes), 10))
    router.defaults = RoutingCall(seed=torch.tensor(9))
    assert equal(router.plan(TOKENS, training=True), first)


def test_one_seed_per_sample_makes_samples_independent_of_the_batch():
    router = make_router()
    seeds = torch.tensor([3, 1, 4, 1])
    router.defaults = RoutingCall(seed=seeds)
    (whole,) = router.plan(TOKENS, training=True)
    assert torch.equal(whole[1], whole[3]) and not torch.equal(whole[0], whole[1])
    for sample in range(4):
        router.defaults = RoutingCall(seed=seeds[sample : sample + 1])
        assert torch.equal(router.plan(TOKENS[sample : sample + 1], training=True)[0][0], whole[sample])


def test_drawn_seeds_depend_on_each_generator_alone():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    seeds = draw_routing_seed(generators(1, 2, 3))
    assert seeds.shape == (3,) and seeds.dtype == torch.int64
    assert torch.equal(seeds[1], draw_routing_seed(generators(2)[0]))
    assert len(set(seeds.tolist())) == 3


# Options.


def test_a_shared_subset_is_the_same_for_all_samples():
    router = make_router([(1, 2, 0.5), (4, 6, 0.5)], shared_subset=True)
    first, second = router.plan(TOKENS, training=True)
    assert (first == first[:1]).all() and (second == second[:1]).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mix", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_forced_tokens_are_never_routed(mix, ratio):
    router = make_router()
    mask = torch.rand(4, 20) < 0.15
    router.defaults = RoutingCall(force_keep=mask, selection_ratio=ratio, magnitude_mix=mix)
    for _ in range(5):
        (ids,) = router.plan(TOKENS, training=True)
        kept = torch.zeros(4, 20, dtype=torch.bool).scatter(1, ids, True)
        assert (kept | ~mask).all()
        assert ids.shape[1] == max(20 - int(20 * ratio), mask.sum(1).max())


def test_a_mask_for_all_samples_may_force_every_token():
    router = make_router(force_keep=torch.ones(20, dtype=torch.bool))
    assert router.plan(TOKENS, training=True) is None


def test_the_magnitude_decides_alone_at_one_and_minus_one():
    router = make_router()
    norms = TOKENS.abs().sum(-1)
    for mix, expected in ((1.0, norms.topk(10).indices), (-1.0, norms.topk(10, largest=False).indices)):
        router.defaults = RoutingCall(magnitude_mix=mix)
        assert torch.equal(router.plan(TOKENS, training=True)[0], expected.sort(1).values)


def test_each_route_has_its_own_magnitude_and_the_router_overrides_all():
    def plan(*mixes, override=None):
        routes = [TokenRoute(start=2 * i, end=2 * i, magnitude_mix=mix) for i, mix in enumerate(mixes)]
        router = TokenRouter(routes, num_layers=12)
        router.defaults = RoutingCall(seed=3, magnitude_mix=override)
        return router.plan(TOKENS, training=True)

    uniform = plan(0.0, 0.0, 0.0)
    mixed = plan(0.4, 0.0, -1.0)
    assert equal(mixed[1:2], uniform[1:2])
    assert torch.equal(mixed[2], TOKENS.abs().sum(-1).topk(10, largest=False).indices.sort(1).values)
    assert not equal(mixed[:1], uniform[:1])
    assert equal(plan(0.4, 0.0, -1.0, override=0.4), plan(0.4, 0.4, 0.4))
    assert equal(plan(0.4, 0.0, -1.0, override=0.0), uniform)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_a_plan_under_autocast_is_the_same(mix):
    router = make_router(seed=3, magnitude_mix=mix)
    expected = router.plan(TOKENS, training=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(router.plan(TOKENS, training=True), expected)


# Bad input.


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("selection_ratio", 1.0, r"selection ratio in \[0, 1\)"),
        ("selection_ratio", -0.1, r"selection ratio in \[0, 1\)"),
        ("seed", 1.5, "64-bit int.*got 1.5"),
        ("enabled", "no", "enabled to be True, False or None, got 'no'"),
        ("seed", True, "64-bit int.*got True"),
        ("seed", 2**63, "64-bit int"),
        ("seed", torch.tensor(1.0), r"int64 tensor.*got torch.float32 \[\]"),
        ("seed", torch.zeros(2, 2, dtype=torch.int64), r"got torch.int64 \[2, 2\]"),
        ("generator", [torch.Generator()], "draw_routing_seed"),
        ("force_keep", torch.ones(20), r"bool tensor \[N\] or \[B, N\].*got torch.float32 \[20\]"),
        ("force_keep", [True], "bool tensor"),
        ("force_keep", torch.tensor(True), "bool tensor"),
        ("magnitude_mix", 1.1, r"magnitude_mix in \[-1, 1\]"),
        ("magnitude_mix", float("nan"), r"magnitude_mix in \[-1, 1\]"),
        ("magnitude_mix", "0.5", r"magnitude_mix in \[-1, 1\]"),
        ("magnitude_mix", True, r"magnitude_mix in \[-1, 1\]"),
    ],
)
def test_a_bad_setting_is_refused_and_changes_nothing(name, value, message):
    denoiser = Denoiser()
    with pytest.raises(ValueError, match=message):
        RoutingCall(**{name: value})
    with pytest.raises(ValueError, match=message), token_routing(denoiser, **{"shared_subset": True, name: value}):
        pass
    assert not denoiser.token_router.has_same_subsets()


def test_settings_that_do_not_fit_the_batch_are_refused():
    router = make_router(seed=torch.arange(3))
    with pytest.raises(ValueError, match=r"one routing seed per sample \(4\), got 3"):
        router.plan(TOKENS, training=True)
    router.defaults = RoutingCall(seed=None)
    for shape in ((19,), (3, 20), (4, 19)):
        router.defaults = RoutingCall(force_keep=torch.zeros(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"shape \[20\] or \[4, 20\]"):
            router.plan(TOKENS, training=True)


def test_bad_routes_are_refused_by_the_router():
    with pytest.raises(ValueError, match="inside the model's 12 blocks"):
        make_router([(2, 12, 0.5)])


# Whose word counts.


def test_the_call_comes_before_what_surrounds_it_and_that_before_the_defaults():
    denoiser = Denoiser().eval()
    router = denoiser.token_router
    router.defaults = RoutingCall(selection_ratio=0.25, seed=4)

    def kept(call=None):
        plan = router.plan(TOKENS, training=False, call=call)
        return None if plan is None else plan[0].shape[1]

    assert kept() == 15 and kept(RoutingCall(selection_ratio=0.5)) == 10
    with token_routing(denoiser, selection_ratio=0.7) as inside:
        assert inside is router and kept() == 6 and kept(RoutingCall(seed=1)) == 6
        with token_routing(denoiser, enabled=False):
            assert kept() is None and kept(RoutingCall(enabled=True)) == 6
        assert kept() == 6 and kept(RoutingCall(selection_ratio=0.0)) is None
        assert router.resolve().seed == 4 and router.resolve(RoutingCall(seed=1)).seed == 1
    assert kept() == 15


def test_what_a_call_leaves_open_is_not_changed():
    denoiser = Denoiser()
    denoiser.token_router.defaults = RoutingCall(selection_ratio=0.7, force_keep=torch.arange(20) < 2)
    with token_routing(denoiser, seed=3):
        (ids,) = denoiser(TOKENS)[1]
    assert ids.shape == (4, 6) and (ids[:, :2] == torch.arange(2)).all()


def test_token_routing_ends_on_error():
    denoiser = Denoiser().eval()
    with pytest.raises(KeyError), token_routing(denoiser, enabled=True):
        raise KeyError
    assert denoiser(TOKENS)[1] is None


def test_no_forward_changes_the_router():
    denoiser = Denoiser()
    router = denoiser.token_router
    before = router.routes, router.defaults, router._surroundings.calls
    with token_routing(denoiser, selection_ratio=0.7, seed=1):
        denoiser(TOKENS)
    assert (router.routes, router.defaults, router._surroundings.calls) == before


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(AttributeError, match="seed"):
        make_router().seed = 3
    with pytest.raises(TypeError, match="ratio"), token_routing(Denoiser(), ratio=0.5):
        pass


def test_threads_do_not_see_each_other():
    denoiser, barrier = Denoiser().eval(), threading.Barrier(3, timeout=20)
    settings = [{"selection_ratio": 0.3, "seed": 1}, {"selection_ratio": 0.7, "seed": 2}, {"enabled": False}]

    def run(settings):
        shapes = []
        for _ in range(50):
            with token_routing(denoiser, **settings):
                barrier.wait()
                plan = denoiser(TOKENS)[1]
                barrier.wait()
            shapes.append(None if plan is None else plan[0].shape[1])
        return shapes

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, settings))
    assert results == [[14] * 50, [6] * 50, [None] * 50]
    assert denoiser(TOKENS)[1] is None


# Copies and wrappers.


def test_copies_have_a_router_of_their_own():
    denoiser = Denoiser()
    denoiser.token_router.defaults = RoutingCall(
        seed=5, magnitude_mix=0.3, force_keep=torch.arange(20) < 2, generator=torch.Generator()
    )
    expected = denoiser(TOKENS)[1]
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert twin.token_router is not denoiser.token_router and twin.token_router.defaults.generator is None
        assert equal(twin(TOKENS)[1], expected)
        twin.token_router.defaults = RoutingCall(enabled=False, seed=6)
        assert denoiser.token_router.defaults.enabled is None and denoiser.token_router.defaults.seed == 5
    assert denoiser.token_router.defaults.generator is not None


def test_a_model_without_a_router_is_refused():
    with pytest.raises(ValueError, match="got Linear, which has no"):
        get_token_router(nn.Linear(2, 2))


def test_the_router_is_found_through_compile_and_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        denoiser = Denoiser()
        wrapped = nn.parallel.DistributedDataParallel(denoiser)
        for model in (wrapped, torch.compile(denoiser, backend="eager"), torch.compile(wrapped, backend="eager")):
            assert get_token_router(model) is denoiser.token_router
        with token_routing(wrapped, selection_ratio=0.7):
            assert wrapped(TOKENS)[1][0].shape == (4, 6)
    finally:
        torch.distributed.destroy_process_group()


def test_the_router_is_found_through_peft():
    peft = pytest.importorskip("peft")
    denoiser = Denoiser()
    wrapped = peft.get_peft_model(denoiser, peft.LoraConfig(target_modules=["proj"]))
    assert get_token_router(wrapped) is denoiser.token_router


def test_a_compiled_plan_takes_new_seeds_without_recompiling():
    denoiser = Denoiser().train()
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in (1, torch.tensor(2), 2**61, -3):
        denoiser.token_router.defaults = RoutingCall(seed=seed)
        assert equal(compiled(TOKENS)[1], denoiser(TOKENS)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
