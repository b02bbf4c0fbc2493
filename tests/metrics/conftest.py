# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Imports of the libraries that metrics are compared with, without torchvision, and of `tiny_evaluation`."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from tiny_evaluation import TinyExtractor, pixels, write_images  # noqa: E402

from diffusers_tread.metrics import evaluate_images, prepare_reference  # noqa: E402


class StandIn(types.ModuleType):
    """A module in which every name is an empty class: enough for `import` and for subclasses."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def torchvision_or_stand_in():
    """Both libraries import torchvision for what is not tested here. transformers must never see the stand-in."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ["", ".datasets", ".models", ".models.inception", ".transforms", ".transforms.functional"]
    modules = {f"torchvision{name}": StandIn(f"torchvision{name}") for name in names}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def import_or_skip(name):
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    with torchvision_or_stand_in():
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def torch_fidelity():
    return import_or_skip("torch_fidelity")


@pytest.fixture(scope="session")
def cleanfid():
    return import_or_skip("cleanfid.fid")


@pytest.fixture
def extractor():
    return TinyExtractor()


@pytest.fixture
def reference_folder(tmp_path):
    return write_images(tmp_path / "reference images", pixels(5, 40))


@pytest.fixture
def prepare(extractor, tmp_path):
    """`prepare_reference`, whose store a test may choose."""
    return functools.partial(prepare_reference, extractor=extractor, batch_size=16, store_dir=tmp_path / "stores")


@pytest.fixture
def evaluate(extractor, tmp_path):
    """`evaluate_images` with all metrics of the reference, and a store for each name."""

    def evaluate(images, reference, store="features", **options):
        options = {"metrics": reference.metrics, "batch_size": 16} | options
        store_dir = tmp_path / store
        return evaluate_images(images, extractor=extractor, reference=reference, store_dir=store_dir, **options)

    return evaluate
