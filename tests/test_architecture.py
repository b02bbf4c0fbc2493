# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The house of docs/architecture.md: who may import whom, and which private names of other libraries are used."""

import ast
import importlib
import inspect
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin

from diffusers_tread.models import DENOISERS


PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_tread"
DOCS = Path(__file__).parents[1] / "docs"

# Each may import those before it and, in its own row, none; files of one folder may import each other.
FLOORS = [
    {"version", "installation", "quiet"},
    set("registry seeds files fingerprint finite distributed markdown hub_errors field_docs typed_config".split()),
    {"settings"},
    {"claims"},
    {"routing", "schedulers", "pictures"},
    {"models", "hooks", "guiders", "objectives"},
    {"flops", "data", "text"},
    {"hub"},
    {"pipelines"},
    {"metrics", "converters"},
    {"runs", "demos"},
    {"cli"},
    {"__main__"},
]


@cache
def modules():
    """The syntax trees of the package by module name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return trees


def imports_of(name, *, deferred):
    """What a module of the package imports of it; `deferred` counts those in functions and under TYPE_CHECKING."""
    tree = modules()[name]
    is_package = (PACKAGE.parent / name.replace(".", "/") / "__init__.py").exists()
    found = set()
    for node in ast.walk(tree) if deferred else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".")[: None if is_package and node.level == 1 else (is_package - node.level)]
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {inner if (inner := f"{source}.{alias.name}") in modules() else source for alias in node.names}
    return found - {name}


def folder(name):
    return name.split(".")[1]


def test_no_module_imports_itself_over_others():
    """Imports in functions and for types count as well: they would hide a circle."""
    graph = {name: imports_of(name, deferred=True) for name in modules()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    # The package itself hands on what is asked of it; nothing in it imports from there.
    assert all(PACKAGE.name not in imports for imports in graph.values())
    for name in graph:
        visit(name)


def test_arrows_point_down():
    floor = {name: index for index, names in enumerate(FLOORS) for name in names}
    for name in modules():
        if name.count(".") == 0:
            continue
        for other in imports_of(name, deferred=True):
            here, there = folder(name), folder(other)
            assert here == there or floor[there] < floor[here], f"{name} imports {other}"


def test_the_house_is_drawn_as_it_stands():
    """After a new import between packages: python docs/draw_house.py."""
    drawing = runpy.run_path(str(DOCS / "draw_house.py"))
    assert (DOCS / "images" / "house.svg").read_text(encoding="utf-8") == drawing["draw"](globals())


# Private names of other libraries. A name is private if it, or a module on its way, begins with an underscore.

DIFFUSERS = "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers"
PRIVATE = {
    "diffusers.hooks._helpers.AttentionProcessorMetadata": f"{DIFFUSERS}/hooks/_helpers.py",
    "diffusers.hooks._helpers.AttentionProcessorRegistry": f"{DIFFUSERS}/hooks/_helpers.py",
    "diffusers.hooks._helpers.TransformerBlockMetadata": f"{DIFFUSERS}/hooks/_helpers.py",
    "diffusers.hooks._helpers.TransformerBlockRegistry": f"{DIFFUSERS}/hooks/_helpers.py",
    "diffusers.models._modeling_parallel.ContextParallelInput": f"{DIFFUSERS}/models/_modeling_parallel.py",
    "diffusers.models._modeling_parallel.ContextParallelOutput": f"{DIFFUSERS}/models/_modeling_parallel.py",
}
# Attributes that others set on their models, guiders and pipelines, and that we read or set, by where.
PRIVATE_ATTRIBUTES = {
    f"{DIFFUSERS}/models/modeling_utils.py": {"_gradient_checkpointing_func", "_parallel_config"},
    f"{DIFFUSERS}/hooks/_helpers.py": {"_registry"},
    f"{DIFFUSERS}/hooks/hooks.py": {"_diffusers_hook"},
    f"{DIFFUSERS}/guiders/guider_utils.py": {
        "_count_prepared", "_input_predictions", "_num_inference_steps", "_step", "_start", "_stop", "_enabled",
        "_prepare_batch", "_prepare_batch_from_block_state", "_identifier_key",
    },
    f"{DIFFUSERS}/pipelines/pipeline_utils.py": {
        "_optional_components", "_callback_tensor_inputs", "_execution_device"
    },
    f"{DIFFUSERS}/models/cache_utils.py": {"_reset_stateful_cache"},
    f"{DIFFUSERS}/pipelines/flux/pipeline_flux.py": {"_pack_latents"},
    "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html": {
        "_modules", "_forward_hooks", "_forward_pre_hooks"
    },
    "https://docs.pytorch.org/docs/stable/generated/torch.compile.html": {"_orig_mod"},
}  # fmt: skip
# What our classes set for diffusers to read.
PRIVATE_SETTINGS = {
    "_attention_backend": f"{DIFFUSERS}/models/modeling_utils.py",
    "_available_processors": f"{DIFFUSERS}/models/attention.py",
    "_callback_tensor_inputs": f"{DIFFUSERS}/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py",
    "_compatibles": f"{DIFFUSERS}/schedulers/scheduling_utils.py",
    "_cp_plan": f"{DIFFUSERS}/models/modeling_utils.py",
    "_default_processor_cls": f"{DIFFUSERS}/models/attention.py",
    "_input_predictions": f"{DIFFUSERS}/guiders/guider_utils.py",
    "_keep_in_fp32_modules": f"{DIFFUSERS}/models/modeling_utils.py",
    "_no_split_modules": f"{DIFFUSERS}/models/modeling_utils.py",
    "_optional_components": f"{DIFFUSERS}/pipelines/pipeline_utils.py",
    "_parallel_config": f"{DIFFUSERS}/models/modeling_utils.py",
    "_repeated_blocks": f"{DIFFUSERS}/models/modeling_utils.py",
    "_skip_layerwise_casting_patterns": f"{DIFFUSERS}/models/modeling_utils.py",
    "_supports_gradient_checkpointing": f"{DIFFUSERS}/models/modeling_utils.py",
    "_supports_qkv_fusion": f"{DIFFUSERS}/models/attention.py",
}


def test_private_imports_are_listed():
    found = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name for name in names if any(part.startswith("_") for part in name.split("."))}
    assert found - {"__future__.annotations"} == set(PRIVATE)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_are_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{name} has moved: see {PRIVATE[name]}"


def test_private_attributes_of_others_are_listed():
    """Attributes that begin with an underscore are ours, or in the list."""
    ours, used, listed = set(), set(), set().union(*PRIVATE_ATTRIBUTES.values())
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours |= {node.attr} - listed
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
                ours.add(ast.literal_eval(node.args[1]))
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used.add(node.attr)
    unlisted = used - ours - listed
    assert not unlisted, f"{sorted(unlisted)}: list them with a link, or do without"


def test_private_settings_of_classes_are_listed():
    found = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            body = node.body if isinstance(node, ast.ClassDef) else ()
            found |= {ast.unparse(line.targets[0]) for line in body if isinstance(line, ast.Assign)}
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    assert private - {"_supports_prefix", "_presets", "_route_unit"} == set(PRIVATE_SETTINGS)


@pytest.mark.parametrize("name", PRIVATE_SETTINGS)
def test_private_settings_are_read_by_diffusers(name):
    link = PRIVATE_SETTINGS[name]
    module = "diffusers" + link.removeprefix(DIFFUSERS).removesuffix(".py").replace("/", ".")
    assert name in inspect.getsource(importlib.import_module(module)), f"nobody reads {name} any more: see {link}"


def test_the_lora_methods_taken_from_sana_adapt_the_transformer_alone():
    from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin

    assert (SanaLoraLoaderMixin._lora_loadable_modules, SanaLoraLoaderMixin.transformer_name) == (
        ["transformer"], "transformer"
    )  # fmt: skip


def test_private_attributes_are_there():
    from diffusers import BaseGuidance, DiffusionPipeline
    from diffusers.hooks import HookRegistry, _helpers

    assert "_gradient_checkpointing_func" in inspect.getsource(ModelMixin)
    assert "_parallel_config" in inspect.getsource(importlib.import_module("diffusers.models.modeling_utils"))
    assert "_diffusers_hook" in inspect.getsource(HookRegistry)
    for table in (_helpers.TransformerBlockRegistry, _helpers.AttentionProcessorRegistry):
        assert isinstance(table._registry, dict)
    for name in ("_optional_components", "_execution_device"):
        assert hasattr(DiffusionPipeline, name)

    class Guider(BaseGuidance):
        _input_predictions = ["pred"]

    guider = Guider(start=0.25, stop=0.5)
    guider.set_state(step=1, num_inference_steps=4, timestep=None)
    assert (guider._start, guider._stop, guider._enabled) == (0.25, 0.5, True)
    assert (guider._step, guider._num_inference_steps, guider._count_prepared) == (1, 4, 0)
    for name in ("_prepare_batch", "_prepare_batch_from_block_state", "_input_predictions"):
        assert hasattr(guider, name)
    assert {"_modules", "_forward_hooks", "_forward_pre_hooks"} <= set(vars(torch.nn.Module()))
    assert torch.compile(torch.nn.Linear(1, 1), backend="eager")._orig_mod is not None


# The names of objectives.


def test_the_names_of_objectives_are_spelled_in_the_registry_alone():
    """But for the defaults of the models' constructors, which are one of them."""
    spelled = {}
    for name, tree in modules().items():
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in ("edm", "flow") and id(node) not in docstrings:
                spelled.setdefault(name, []).append(node.value)
    defaults = {denoiser.__module__: ["edm"] for denoiser in DENOISERS.values()}
    assert spelled == {"diffusers_tread.objectives.registry": ["edm", "flow"]} | defaults
