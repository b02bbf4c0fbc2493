# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The command `diffusers-tread`, and the examples as files that need nothing beside them."""

import ast
import re
import runpy
import shutil
import sys
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffusers_tread
from diffusers_tread import cli
from diffusers_tread.cli import TASKS
from diffusers_tread.installation import how_to_install
from diffusers_tread.runs import signals
from diffusers_tread.runs.signals import resume_command


ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = [path for path in EXAMPLES if path.stem != "minimal_loop"]  # which has no flags: it is there to be copied
PACKAGE = ROOT / "src" / "diffusers_tread"
# What the dependencies of the package bring, theirs included.
BASE = {"torch", "diffusers", "safetensors", "huggingface_hub", "numpy", "PIL", "tqdm"}
by_file = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
by_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def argv(monkeypatch):
    """Puts back what a task changes."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_help_has_a_sentence_for_each_example_and_a_few_tasks_more(capsys):
    assert sorted(TASKS.values()) == [path.stem for path in SCRIPTS]
    assert cli.main([]) is None
    lines = re.findall(r"^  (\S+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    tasks = dict(lines)
    assert set(tasks) - {"accelerate"} >= {*TASKS, "convert", "examples"}
    assert all(tasks[task].endswith((".", "`.")) for task in [*TASKS, "convert", "examples"])


def test_the_guides_table_has_every_example_and_its_task():
    guide = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", guide, re.MULTILINE)
    files = re.findall(r"(\w+)\.py|`make (demo[\w-]*)", " ".join(left for left, _ in rows))
    assert {file or target.replace("-", "_") for file, target in files} == set(TASKS.values())
    named = set(re.findall(r"[ `]([a-z]+(?:-[a-z]+)*)(?= \.\.\.`|`)", " ".join(right for _, right in rows)))
    assert set(TASKS) | {"convert"} <= named


def test_the_version_is_told_and_an_unknown_task_refused(capsys):
    assert cli.main(["--version"]) is None
    assert capsys.readouterr().out.strip() == diffusers_tread.__version__
    assert cli.main(["trian"]) == 2
    assert "Expected one of train, train-text" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["train", "demo", "convert", "examples"])  # by tyro and by argparse
def test_a_task_s_help_is_that_of_its_file_under_the_command_s_name(task, argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([task, "--help"])
    assert ended.value.code in (None, 0)
    assert re.search(rf"usage: diffusers-tread {task}\s", capsys.readouterr().out)


def test_exit_codes_and_errors_are_the_task_s_own(argv):
    with pytest.raises(ValueError, match="Expected --num_images divisible by the 10 classes"):
        cli.main(["demo", "--num_images", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--no_such_flag"])
    assert ended.value.code == 2


def test_a_shell_gets_a_refusal_as_one_sentence_and_other_errors_whole(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-tread", "demo", "--num_images", "5"])
    assert cli.command() == 2
    said = capsys.readouterr().err
    assert said.startswith("diffusers-tread demo: Expected --num_images divisible") and said.count("\n") == 1
    monkeypatch.setattr(cli, "main", lambda: int("Expected "))  # an error of Python's own
    with pytest.raises(ValueError):
        cli.command()


def test_the_examples_are_copied_out_and_not_over_others(argv, tmp_path, capsys):
    assert cli.main(["examples", str(tmp_path)]) == 0
    copied = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sources = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml")]
    assert copied == {str(path.relative_to(ROOT / "examples")) for path in sources}

    (tmp_path / "sample.py").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["examples", str(tmp_path)])
    assert "sample.py" in capsys.readouterr().err and (tmp_path / "sample.py").read_text() == "mine"
    with pytest.raises(SystemExit):
        cli.main(["examples", str(tmp_path / "sample.py")])
    assert "Expected a folder, got the file" in capsys.readouterr().err
    assert cli.main(["examples", str(tmp_path), "--overwrite"]) == 0
    assert (tmp_path / "sample.py").read_text() == (ROOT / "examples" / "sample.py").read_text()


@pytest.mark.parametrize(
    "program, processes, command",
    [
        ("examples/train_tread.py", 1, "python examples/train_tread.py --seed 1"),
        ("my files/train.py", 2, "accelerate launch --num_processes 2 'my files/train.py' --seed 1"),
        ("diffusers-tread train", 1, "diffusers-tread train --seed 1"),
        ("diffusers-tread train", 2, "accelerate launch --num_processes 2 -m diffusers_tread train --seed 1"),
    ],
)
def test_the_command_to_go_on_is_the_way_it_was_started(program, processes, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--seed", "1"])
    monkeypatch.setattr(signals, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    assert resume_command(None) == command


@by_script
def test_a_file_alone_in_a_folder_runs(path, tmp_path, monkeypatch, capsys):
    """In this process, without the folder of the examples on the path."""
    if path.stem == "app":
        pytest.importorskip("gradio")
    alone = shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(folder for folder in sys.path if folder != str(path.parent))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(alone, run_name="__main__")
    assert ended.value.code in (None, 0) and re.search(rf"usage: \S*{path.name} ", capsys.readouterr().out)
    assert "__file__" not in path.read_text(encoding="utf-8")  # nor does it look for others when it works


# Extras.


def imported(tree):
    """The full names of what a file imports at its start, and of what it may mean: modules, or names in modules."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_in_all(path):
    """The outermost names of what a file imports, and of what the package's modules import that it imports."""
    seen, names = set(), imported(ast.parse(path.read_text(encoding="utf-8")))
    while new := {name for name in names if name.startswith("diffusers_tread")} - seen:
        seen |= new
        for name in new:
            names |= {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
            file = PACKAGE.parent / name.replace(".", "/")
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            if file.exists():
                names |= imported(absolute(ast.parse(file.read_text(encoding="utf-8")), file))
    return {name.partition(".")[0] for name in names}


def absolute(tree, file):
    """Writes out the relative imports of a module of the package."""
    folders = file.relative_to(PACKAGE.parent).parts[:-1]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folders[: len(folders) + 1 - node.level]
            node.module, node.level = ".".join([*base, *([node.module] if node.module else [])]), 0
    return tree


@by_file
def test_a_file_says_which_extra_it_lacks_for_every_package_it_imports(path, monkeypatch):
    calls = re.findall(r"^require\((.*?)\)$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    extra, *modules = ast.literal_eval(f"({calls[0]})")
    for module in modules:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf'got no {module}\. Do `pip install "diffusers-tread\[{extra}\]"`'):
                runpy.run_path(str(path), run_name="example")
    assert imported_in_all(path) - set(sys.stdlib_module_names) - BASE - {"diffusers_tread"} <= set(modules)


def test_others_are_told_how_to_get_the_package(monkeypatch):
    for urls, command in {
        (): "`pip install .` in a clone of its repository",
        ("Repository, https://example.org/ant",): "`pip install git+https://example.org/ant`",
    }.items():
        message = Message()
        for url in urls:
            message["Project-URL"] = url
        monkeypatch.setattr(metadata, "metadata", lambda name, message=message: message)
        assert how_to_install() == f"`pip install diffusers-tread` or, where no index has it, {command}"
