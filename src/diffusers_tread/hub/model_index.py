# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checks `model_index.json`, so that loading a folder never runs code from it.

Older diffusers (seen in 0.36) runs files of a local folder without asking: `COMPONENT/LIBRARY.py` instead of the
library that an entry names, and `None.py` as a pipeline. It also imports any installed module that an entry names.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers


_KINDS = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.BaseGuidance)


def check_model_index(
    index: Mapping[str, Any],
    folder: str | Path,
    *,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    own: str | None = None,
) -> None:
    """Checks the content of a `model_index.json` before anything is loaded.

    Args:
        index: Its content.
        folder: Its folder. For a name on the Hub, there are no files to check.
        required: Components that a pipeline needs.
        optional: Components that may be [null, null]. Every other list is treated as a component, as in diffusers.
        own: A module whose classes are allowed besides those of diffusers and transformers.

    Raises:
        ValueError: An entry is invalid or names another class, or the folder has code that would be run.
    """
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(_message("_class_name", index.get("_class_name"), folder))
    files = [Path(folder, "None.py")]
    for name, entry in index.items():
        if name.startswith("_") or not (name in (*required, *optional) or isinstance(entry, (list, tuple))):
            continue
        if entry in ([None, None], (None, None)) and name not in required:
            continue
        if not name.isidentifier() or not _is_allowed(entry, own):
            raise ValueError(_message(name, entry, folder))
        files.append(Path(folder, name, f"{entry[0]}.py"))
    if code := [str(path) for path in files if path.exists()]:
        raise ValueError(
            f"Expected a folder without code in the place of a library, got {code}. Nothing of it was run. Look at "
            "these files and delete them."
        )


def _is_allowed(entry: Any, own: str | None) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        return False
    library, name = entry
    if library == "diffusers":
        kind = getattr(diffusers, name, None)
        return isinstance(kind, type) and issubclass(kind, _KINDS)
    return library in ("transformers", own) and name.isidentifier()


def _message(name: str, entry: Any, folder: str | Path) -> str:
    return (
        f"Expected components of diffusers, transformers or diffusers_tread in model_index.json, got {name!r}: "
        f"{entry!r} in {folder}. Nothing of it was run. If you trust its code, load the parts by themselves and make "
        "a pipeline of them; classes of your own are made known by register_denoiser and register_guider."
    )
