# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The command `diffusers-tread`: runs the examples that come with the package, or copies them out for editing."""

import argparse
import ast
import importlib
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .installation import NAME
from .version import __version__


TASKS = {
    "train": "train_tread",
    "train-text": "train_text_to_image_tread",
    "train-text-lora": "train_text_to_image_lora_tread",
    "precompute": "precompute_latents",
    "import-latents": "import_latents",
    "sample": "sample",
    "evaluate": "evaluate_tread",
    "app": "app",
    "make-avatars": "make_avatars",
    "demo": "demo",
    "demo-avatars": "demo_avatars",
    "demo-text": "demo_text",
}
"""The example that each task runs, a file in `examples_folder()`."""
CONVERT = "diffusers_tread.converters.__main__"

_COPY_SUMMARY = "Copies the examples into a folder, to be edited and run there."
_USAGE = f"""\
usage: {NAME} TASK ...
       accelerate launch -m diffusers_tread TASK ...   on several processes

`{NAME} TASK --help` lists the flags of a task, `{NAME} --version` tells the version.
"""


def command() -> int | None:
    """`main` for a shell, where an error that this package or an example raises on purpose is told in one sentence.

    Returns:
        The exit code, 2 for such an error; the examples run as files have the traceback.
    """
    try:
        return main()
    except (ValueError, ImportError, OSError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_ours = Path(__file__).parent in (file := Path(frame.f_code.co_filename)).parents
        if not (is_ours or examples_folder() in file.parents) or not str(error).startswith("Expected "):
            raise
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs a task.

    Args:
        argv: The task's name and flags; None for the arguments of this process.

    Returns:
        The exit code; None for success.

    Raises:
        SystemExit: If the task exits that way.
    """
    # Help and version.
    task, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if task in ("-h", "--help"):
        return print(_USAGE + "\n" + "\n".join(f"  {name:16} {summary}" for name, summary in summaries().items()))
    if task == "--version":
        return print(__version__)

    # An unknown task.
    if task not in (known := [*TASKS, "convert", "examples"]):
        print(f"Expected one of {', '.join(known)}, got {task!r}. `{NAME} --help` explains them.", file=sys.stderr)
        return 2

    # The task reads its flags, and its name for messages, from `sys.argv`.
    sys.argv = [f"{NAME} {task}", *words]
    if task == "examples":
        return _copy_examples()
    if task == "convert":
        return importlib.import_module(CONVERT).main(prog=sys.argv[0])
    sys.path.insert(0, str(examples_folder()))  # as `python FILE` does; processes that the task starts need it too
    return importlib.import_module(TASKS[task]).main()


def summaries() -> dict[str, str]:
    """A one-line summary of each task: the first line of its file's docstring."""
    files = {task: examples_folder() / f"{name}.py" for task, name in TASKS.items()}
    files["convert"] = Path(__file__).with_name("converters") / "__main__.py"
    sentences = {task: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for task, file in files.items()}
    return {task: text.partition("\n")[0] for task, text in sentences.items()} | {"examples": _COPY_SUMMARY}


def examples_folder() -> Path:
    """The folder of the examples: in the package or, if it is imported from a clone, at the clone's root."""
    package = Path(__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parents[1] / "examples"


def _copy_examples() -> int:
    parser = argparse.ArgumentParser(description=_COPY_SUMMARY, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="Where they go; it is made if missing.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files of the same names.")
    args = parser.parse_args()

    if files := [str(path) for path in (args.folder, *args.folder.parents) if path.exists() and not path.is_dir()]:
        parser.error(f"Expected a folder, got the file {files[0]}. Name another one.")

    # The files, none of which may be there yet.
    source = examples_folder()
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.suffix in (".py", ".yaml")]
    there = [str(path) for path in files if (args.folder / path).exists()]
    if there and not args.overwrite:
        parser.error(
            f"Expected none of the examples in {args.folder}, got {', '.join(there)}. Name another folder, or "
            "--overwrite them."
        )

    # Copies.
    for path in files:
        (args.folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, args.folder / path)
    print(f"Copied {len(files)} files to {args.folder}.")
    return 0
