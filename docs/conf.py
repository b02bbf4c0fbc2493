# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sphinx's configuration: `make docs` turns the guides and the docstrings into the pages of build/docs.

The pages of the reference, docs/api, are made anew each time from what the packages name in `__all__`.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers_tread


project = "diffusers-tread"
copyright = "2026, the diffusers-tread authors"  # noqa: A001 - the name that Sphinx reads
version = release = diffusers_tread.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # which index.rst includes
myst_heading_anchors = 4  # links to headings, with the anchors that GitHub gives them
html_theme = "furo"
html_title = f"diffusers-tread {version}"

highlight_language = "none"  # of blocks that name none
default_role = "py:obj"  # a name in single backticks is a link where the reference has it
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "show-inheritance": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


def packages() -> list[ModuleType]:
    """The package's own namespace, then the packages and modules in it that say what of them is public."""
    found = [importlib.import_module(f"diffusers_tread.{entry.name}") for entry in
             pkgutil.iter_modules(diffusers_tread.__path__)]  # fmt: skip
    return [diffusers_tread, *(module for module in found if hasattr(module, "__all__"))]


def public_names() -> dict[str, str]:
    """The shortest path by which each public object is imported, by its name."""
    names = {}
    for module in packages():
        for name in module.__all__:
            if name != "__version__":
                names.setdefault(name, f"{module.__name__}.{name}")
    return names


def api_pages() -> dict[str, str]:
    """The text of each page of the reference by its name: one for each package, all that it exports."""
    paths = public_names()
    pages = {}
    for module in packages()[1:]:
        values = {name: getattr(module, name) for name in sorted(module.__all__, key=str.lower)}
        classes_first = sorted(values.items(), key=lambda item: not isinstance(item[1], type))
        entries = [entry(paths[name], value) for name, value in classes_first]
        head = f"{module.__name__}\n{'=' * len(module.__name__)}\n\n{module.__doc__ or ''}\n\n"
        pages[module.__name__] = head + "\n".join(entries)
    return pages


def entry(path: str, value: Any) -> str:
    """The directive that documents one object."""
    if isinstance(value, type):
        return f".. autoclass:: {path}\n"
    if callable(value):
        return f".. autofunction:: {path}\n"
    return f".. py:data:: {path}\n\n   What is known by name: {', '.join(f'``{name}``' for name in value)}.\n"


def write_api_pages(app: Any) -> None:
    """Into docs/api; what is unchanged stays, so that Sphinx does not read it again."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = api_pages()
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def find_public_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Links a bare name, `TokenRoute` or `TokenRoute.start`, to where the reference has it."""
    name, _, rest = node.get("reftarget", "").partition(".")
    path = public_names().get(name)
    if path is None or node.get("refdomain") != "py":
        return None
    target = f"{path}.{rest}" if rest else path
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def prepare_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: a class goes without the section of its fields, each of which has an entry with its default.

    What stands before a colon in a field's docstring is text, which napoleon would take for its type.
    """
    if what == "class" and hasattr(value, "__dataclass_fields__") and "Attributes:" in lines:
        del lines[lines.index("Attributes:") :]
    if what in ("attribute", "property") and lines:
        lines[0] = f": {lines[0]}"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", prepare_docstring, priority=100)
    app.connect("builder-inited", write_api_pages)
    app.connect("missing-reference", find_public_name)
