# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the README, the guides and the docstrings show, runs; what they name, exists."""

import doctest
import importlib
import io
import json
import pkgutil
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

import diffusers_tread
from diffusers_tread.metrics import METRICS, SCORERS


ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
MODULES = [diffusers_tread.__name__] + sorted(
    module.name for module in pkgutil.walk_packages(diffusers_tread.__path__, "diffusers_tread.")
)
# An optional "<!-- not run: reason -->" line, then a fenced block.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>\S.*?) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def by_name(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document, language):
    """(first line, code, reason not to run it or None) of each block of a language."""
    text = document.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")), match["code"], match["reason"])
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


def shell_commands(document):
    """The commands of the shell blocks, one list of words each; lines joined at backslashes, comments dropped."""
    code = "".join(code for language in ("bash", "shell", "sh") for _, code, _ in blocks(document, language))
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|\||;|\|", line):
            if words := shlex.split(command.removeprefix("$ "), comments=True):
                commands.append(words)
    return commands


def known_flags(script, cache={}):  # noqa: B006 - one help text per script
    """In this process, which has most of what scripts import."""
    if script not in cache:
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [str(script), "--help"])
            patch.syspath_prepend(script.parent)
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code in (None, 0)
        cache[script] = set(re.findall(r"--[\w-]+", output.getvalue()))
    return cache[script]


@by_name([document for document in DOCUMENTS if blocks(document, "python")])
def test_the_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace = {"__name__": "__main__"}
    with mock.patch.dict(METRICS), mock.patch.dict(SCORERS):  # a guide may add one
        for line, code, reason in blocks(document, "python"):
            # Empty lines in front, so that a traceback names the line of the document.
            program = compile("\n" * line + code, str(document), "exec")
            if reason is None:
                exec(program, namespace)


@by_name(DOCUMENTS)
def test_every_block_says_its_language_and_every_fence_is_closed(document):
    fences = re.findall(r"^```.*$", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert {fence for fence in fences[1::2]} <= {"```"}
    assert {fence for fence in fences[::2]} <= {"```", "```python", "```bash", "```bibtex", "```json", "```yaml"}


@by_name(DOCUMENTS)
def test_the_make_targets_that_the_documents_name_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    inline = re.findall(r"`make ([\w-]+)[^`]*`", document.read_text(encoding="utf-8"))
    in_blocks = [words[1] for words in shell_commands(document) if words[0] == "make"]
    assert set(inline + in_blocks) <= targets


@by_name(DOCUMENTS)
def test_the_scripts_and_flags_of_the_shell_blocks_exist(document):
    for words in shell_commands(document):
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts:
            continue
        flags = {word.split("=")[0] for word in words[words.index(scripts[0]) + 1 :] if word.startswith("--")}
        assert (ROOT / scripts[0]).is_file(), scripts[0]
        if flags:  # whose help needs the packages that the script needs
            assert flags - known_flags(ROOT / scripts[0]) == set(), shlex.join(words)
        files = [word for word in words if re.fullmatch(r"(examples|benchmarks)/\S+\.json", word)]
        assert [name for name in files if "results" not in name and not (ROOT / name).is_file()] == []


@by_name(DOCUMENTS)
def test_the_files_that_a_document_links_to_exist(document):
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_the_readme_s_tree_names_what_is_there():
    (tree,) = [code for _, code, _ in blocks(ROOT / "README.md", "") if code.startswith("src/")]
    folder = ROOT
    for line in tree.splitlines():
        path = (folder if line.startswith(" ") else ROOT) / line.split()[0]
        folder = folder if line.startswith(" ") else path
        assert path.exists(), path


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_the_readme_s_speed_ups_are_those_of_the_committed_benchmark():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = dict(re.findall(r"DiT-(\w/\d)[^*]*\*\*(TBD|[\d.]+)×\*\*", readme))
    results = ROOT / "benchmarks" / "results" / "train_step_cpu.json"
    measured = {"B/2": "TBD", "S/2": "TBD"}
    if results.exists():
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
        measured = {row["preset"]: f"{row['speedup']:.2f}" for row in rows if row["mode"] == "eager"}
    assert quoted == measured


def test_a_block_marked_as_not_run_is_compiled_but_not_executed(tmp_path):
    document = tmp_path / "guide.md"
    marked = "<!-- not run: needs a GPU -->\n```python\nraise SystemExit\n```\n"
    document.write_text(f"text\n\n{marked}\n```python\nx = 1\n```\n")
    assert blocks(document, "python") == [(4, "raise SystemExit\n", "needs a GPU"), (8, "x = 1\n", None)]
