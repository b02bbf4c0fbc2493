# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How the package is installed: its name for pip, its extras, and where to get it."""

from importlib import metadata
from importlib.util import find_spec


NAME = "diffusers-tread"
"""The name of the package for pip, and of its command."""

FID_NETWORKS = "pip install --no-deps clean-fid torch-fidelity"
"""Installs the networks of FID. `--no-deps`, because they depend on torchvision, which this package does not need and
for which pip would install the newest release together with its torch."""


def require(extra: str, *modules: str) -> None:
    """Raises an ImportError that says what to install, before an import fails.

    Args:
        extra: The extra of this package that installs the modules; several separated by commas.
        modules: The modules that will be imported.

    Raises:
        ImportError: A module is missing.

    Example:
        >>> from diffusers_tread.installation import require
        >>> require("train", "json", "no_such_module")
        Traceback (most recent call last):
        ImportError: Expected json, no_such_module, got no no_such_module. Do `pip install "diffusers-tread[train]"`.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ImportError(
            f'Expected {", ".join(modules)}, got no {", no ".join(missing)}. Do `pip install "{NAME}[{extra}]"`.',
            name=missing[0],
        )


def how_to_install() -> str:
    """Commands that install the package, for model cards and errors."""
    return f"`pip install {NAME}` or, where no index has it, {_from_source()}"


def _from_source() -> str:
    address = repository()
    return "`pip install .` in a clone of its repository" if address is None else f"`pip install git+{address}`"


def repository() -> str | None:
    """The URL of the repository in the installed package's metadata; None if it has none."""
    try:
        urls = metadata.metadata(NAME).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # not installed, but imported from a folder on sys.path
        urls = []
    return dict(url.split(", ", 1) for url in urls).get("Repository")
