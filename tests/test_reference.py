# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The pages of the reference, and what `help()` shows."""

import dataclasses
import inspect
import pydoc
import re
import runpy
from pathlib import Path

import pytest

import diffusers_tread
from diffusers_tread import TokenRoute


SITE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "conf.py"))
PAGES = SITE["api_pages"]()
DATACLASSES = {
    value
    for module in SITE["packages"]()
    for value in (getattr(module, name) for name in module.__all__)
    if isinstance(value, type) and "__dataclass_fields__" in vars(value)
}


def test_the_reference_has_each_public_name_once():
    entries = re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE)
    assert sorted(entries) == sorted(SITE["public_names"]().values())
    assert {f"diffusers_tread.{name}" for name in diffusers_tread.__all__} - set(entries) == {
        "diffusers_tread.__version__"
    }


def test_each_page_of_the_reference_begins_with_what_the_package_is_for():
    assert len(PAGES) > 10
    for name, text in PAGES.items():
        assert re.match(rf"{re.escape(name)}\n=+\n\n\w", text), name


def test_public_classes_and_functions_have_a_docstring():
    values = [getattr(module, name) for module in SITE["packages"]() for name in module.__all__]
    undocumented = [value for value in values if callable(value) and not inspect.getdoc(value)]
    assert undocumented == []


@pytest.mark.parametrize("cls", sorted(DATACLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_help_shows_the_docstrings_of_fields(cls):
    source = inspect.getsource(cls)
    described = re.findall(r'^    (\w+): [^"\n]*\n    """', source, re.MULTILINE)
    described = [field.name for field in dataclasses.fields(cls) if field.name in described]
    shown = re.sub(r"\s+", " ", inspect.getdoc(cls))
    assert [name for name in described if f" {name}: " not in shown] == []


def test_help_shows_a_field_with_its_whole_docstring():
    text = re.sub(r"\s+", " ", re.sub(r"^ \|", "", pydoc.plain(pydoc.render_doc(TokenRoute)), flags=re.MULTILINE))
    assert "selection_ratio: Share of tokens routed **away** from blocks start..end, in [0, 1). 0.0 is dense." in text
    assert TokenRoute(start=2, end=8).__doc__ == TokenRoute.__doc__
