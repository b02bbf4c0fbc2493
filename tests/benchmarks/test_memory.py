# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/memory.py on a model whose batches hardly count, and what gradient checkpointing stores of a route."""

import gc
import json
import weakref

import memory
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_tread import RoutingCall, TokenRoute, TREADTransformer2DModel, get_token_router


TINY = ["--preset", "S/8", "--tokens", "4", "--batch_sizes", "1,2", "--check_batch_size", "3"]


@pytest.mark.long
def test_it_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "KINDS", {"routed": memory.KINDS["routed"]})
    report = memory.main([*TINY, "--output", str(tmp_path / "new" / "report.json")])
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(json.dumps(report))
    (row,) = report["rows"]
    weights = 4 * 4 * sum(parameter.numel() for parameter in TREADTransformer2DModel.from_preset("S/8").parameters())
    assert list(row["peak_bytes"]) == ["1", "2", "3"] and min(row["peak_bytes"].values()) > weights
    assert memory.table(report).count("\n") == 2 and "S/8, 4 tokens, float32" in memory.table(report)


def test_the_line_goes_through_points_on_a_line_and_says_how_far_off_another_one_is():
    args = memory.parse_args(["--batch_sizes", "2,4,8", "--check_batch_size", "16", "--budget_gib", "1"])
    row = memory.fit({2: 700, 4: 900, 8: 1300, 16: 2000}, args)
    assert (row["bytes_per_image"], row["fixed_bytes"]) == pytest.approx((100, 500))
    assert row["largest_batch_in_budget"] == (2**30 - 500) // 100
    assert row["line_over_measured_at_check"] == pytest.approx(2100 / 2000)
    assert memory.fit({2: 700, 4: 700, 8: 700, 16: 700}, args)["largest_batch_in_budget"] is None


@pytest.mark.parametrize("largest", [0, 1, 5, 64, 100])
def test_the_search_finds_the_largest_batch_that_runs(largest):
    tried = []

    def runs(batch_size):
        tried.append(batch_size)
        return batch_size <= largest

    assert largest * 0.98 <= memory.search(runs) <= largest
    assert max(tried) <= max(2 * largest, 1)


@pytest.mark.parametrize(("kind", "length"), [("dense", 4), ("routed", 2), ("routed, checkpointing", 2)])
def test_a_step_is_of_its_kind(kind, length, monkeypatch):
    model = TREADTransformer2DModel.from_preset("S/8", sample_size=16)
    monkeypatch.setattr(TREADTransformer2DModel, "from_preset", lambda *args, **settings: model)
    step = memory.make_step(memory.parse_args(TINY), kind, 1)
    before, lengths = model.proj_out.weight.detach().clone(), []
    model.transformer_blocks[4].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    step()
    assert set(lengths) == {length}
    assert len(lengths) == (2 if "checkpointing" in kind else 1)  # once more in the backward
    assert not torch.equal(model.proj_out.weight, before)


class Storages(TorchDispatchMode):
    """Remembers what operators return, without keeping it."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        return result

    def live_bytes(self):
        gc.collect()
        return sum(storage().nbytes() for storage in self.storages.values() if storage() is not None)


def stored_bytes(last_routed_block, *, checkpointing):
    """What a forward leaves for the backward, with a route from block 1 that keeps 16 of 64 tokens."""
    route = TokenRoute(start=1, end=last_routed_block, selection_ratio=0.75)
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 9, "sample_size": 16}
    model = TREADTransformer2DModel(**size, num_classes=10, routes=[route]).train()
    get_token_router(model).defaults = RoutingCall(seed=0)
    if checkpointing:
        model.enable_gradient_checkpointing()
    latents, labels = torch.randn(3, 4, 16, 16), torch.zeros(3, dtype=torch.int64)
    with Storages() as storages:
        output = model(latents, torch.zeros(3), labels).sample  # noqa: F841 - holds the graph
    return storages.live_bytes()


def test_checkpointing_stores_the_short_sequence_of_a_routed_block():
    # Three more blocks in the route: of each, 3 samples x (64 - 16) tokens x 32 channels of float32 are not stored.
    saved = 3 * 3 * (64 - 16) * 32 * 4
    stored = [stored_bytes(last, checkpointing=True) for last in (2, 5)]
    assert stored[0] - stored[1] == saved
    whole = [stored_bytes(last, checkpointing=False) for last in (2, 5)]
    assert whole[0] - whole[1] > 5 * saved
