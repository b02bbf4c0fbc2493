# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How the package is installed: its name for pip, its extras, where others get it."""

from importlib import metadata
from importlib.util import find_spec


NAME = "diffusers-tread"
"""What pip calls the package, and what its command is called."""

FID_NETWORKS = "pip install --no-deps clean-fid torch-fidelity"
"""Installs the networks of FID. They ask for torchvision, of which pip takes the newest and the torch that goes with
it; what this package uses of them needs none."""


def require(extra: str, *modules: str) -> None:
    """Says in one sentence what to install, before an import fails.

    Args:
        extra: The extra of this package that brings the modules; several with commas between.
        modules: What will be imported.

    Raises:
        ImportError: Modules are missing.

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
    """Commands that bring the package to somebody who does not have it, for cards and errors."""
    return f"`pip install {NAME}` or, where no index has it, {_from_source()}"


def _from_source() -> str:
    address = repository()
    return "`pip install .` in a clone of its repository" if address is None else f"`pip install git+{address}`"


def repository() -> str | None:
    """The address of the repository that the installed package was built from; None if it does not say."""
    try:
        urls = metadata.metadata(NAME).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # taken from a folder on sys.path
        urls = []
    return dict(url.split(", ", 1) for url in urls).get("Repository")
