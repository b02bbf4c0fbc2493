# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Every transformer of the installed diffusers is either routed and tested, or refused for a reason."""

import inspect
import re

import diffusers
import pytest
import tiny_transformers
import torch
from diffusers.models import transformers as diffusers_transformers
from support_table import GUIDE, all_transformers, reason_to_refuse, support_table

from diffusers_tread import TokenRoute, TREADTransformer2DModel, apply_token_routing
from diffusers_tread.hooks.specs import BLOCK_SPECS


ROUTE = TokenRoute(start=1, end=-4)


@pytest.mark.parametrize("name", all_transformers())
def test_each_transformer_of_diffusers_is_routed_or_refused(name):
    tested = name in tiny_transformers.classes()
    refused = reason_to_refuse(name) is not None
    assert tested != refused, (
        f"{name} is new to routing: add its blocks to BLOCK_SPECS and a row to tiny_transformers.py, or give a "
        "reason in REFUSED_MODELS or REFUSED_BLOCKS."
    )


def test_the_walk_sees_the_transformers():
    assert {"DiTTransformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel"} <= set(all_transformers())


def test_at_least_46_classes_are_routed():
    if len(all_transformers()) < 60:
        pytest.skip(f"diffusers {diffusers.__version__} has {len(all_transformers())} transformers in all")
    assert len(tiny_transformers.classes()) >= 46


def test_the_guides_support_table_is_that_of_the_newest_diffusers():
    guide = GUIDE.read_text()
    if set(re.findall(r"^\| (\w+) \|", guide, re.MULTILINE)) - {"model", "refused"} != set(all_transformers()):
        pytest.skip("the table was made with another diffusers")
    assert support_table() in guide, "run python tests/hooks/support_table.py"


def test_every_block_of_the_table_is_tested_if_this_diffusers_has_it():
    built = {
        type(m).__name__ for name in tiny_transformers.names() for m in tiny_transformers.build(name).model.modules()
    }
    source = "".join(
        inspect.getsource(inspect.getmodule(getattr(diffusers_transformers, name))) for name in all_transformers()
    )
    known = {name.split("/")[0] for name in BLOCK_SPECS}
    assert {name for name in known if f"class {name}(" in source} <= built


def test_refused_models_name_the_reason():
    model = tiny_transformers.make("PriorTransformer", embedding_dim=8, num_embeddings=3)
    with pytest.raises(ValueError, match="PriorTransformer cannot be routed: its stream holds conditions"):
        apply_token_routing(model, ROUTE)
    assert "forward" not in model.__dict__


def test_our_own_model_is_told_to_route_by_itself():
    with pytest.raises(ValueError, match="give TREADTransformer2DModel its `routes`"):
        apply_token_routing(TREADTransformer2DModel(num_layers=8, routes=None, sample_size=8), ROUTE)


def test_unknown_blocks_name_the_way_to_register_them():
    class UnknownBlock(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    class MyModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(UnknownBlock() for _ in range(8))

    with pytest.raises(ValueError, match=r"got UnknownBlock in MyModel.*register_block_spec\('UnknownBlock', BlockSp"):
        apply_token_routing(MyModel(), ROUTE)
