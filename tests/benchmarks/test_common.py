# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import platform
import subprocess
import sys
from pathlib import Path

import common
import pytest


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two files, one of code and one of results."""
    for name in ("benchmarks/common.py", "benchmarks/results/step.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git = ["git", "-C", tmp_path, "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "benchmarks" / "common.py"))
    return tmp_path


def test_a_result_that_was_written_is_no_change_of_the_code(checkout):
    state = common.source_state()
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (checkout / "benchmarks" / "results" / "step.json").write_text("after")
    assert common.source_state() == state
    (checkout / "benchmarks" / "common.py").write_text("after")
    assert common.source_state() == state | {"dirty": True}


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.source_state() == {"commit": None, "dirty": None}


def test_steps_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    args = common.make_parser("A test.", repeats=3, warmup=2).parse_args([])
    seconds = common.time_in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, args)
    assert calls == ["a", "b"] * 5
    assert [len(one) for one in seconds.values()] == [3, 3]


def test_latents_have_the_side_that_the_tokens_ask_for():
    assert common.latent_size("XL/2", 256) == 32 and common.latent_size("B/4", 1024) == 128
    for tokens in (0, 200):
        with pytest.raises(ValueError, match=f"Expected square numbers for --tokens, .* got {tokens}"):
            common.latent_size("XL/2", tokens)


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_kept():
    """In a process of its own, where nothing asked for it before."""
    program = """
import common, torch
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
keeps = common.keep_freed_memory()
before = resident()
torch.ones(2**26)
print(keeps, resident() - before > 2**27)
"""
    folder = Path(common.__file__).parent
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert result.stdout.split() == ["True", "True"], result.stderr
