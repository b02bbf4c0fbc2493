# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""One run at a time in a folder, and only one of the same settings."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import sys

import psutil
import pytest

from diffusers_tread import claims
from diffusers_tread.claims import LOCK, FolderLock, claim
from diffusers_tread.settings import check_settings


fork = multiprocessing.get_context("fork")


@pytest.fixture
def elsewhere():
    """Locks a folder in another process, which keeps it until it is killed; gives the process."""
    children = []

    def take(folder):
        there, here = fork.Pipe()

        def work():
            FolderLock.take(folder)
            there.send(True)
            signal.pause()

        child = fork.Process(target=work, daemon=True)
        child.start()
        assert here.poll(30) and here.recv()
        children.append(child)
        return child

    yield take
    for child in children:
        child.kill()
        child.join()


def owner(**changes):
    me = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": psutil.Process().create_time()}
    return json.dumps(me | {"since": "today", "command": "train.py"} | changes)


def test_a_second_process_is_refused_by_a_sentence_that_names_the_first(tmp_path, elsewhere):
    child = elsewhere(tmp_path)
    with pytest.raises(
        ValueError, match=f"for this run alone, got one at work there .process {child.pid} on"
    ) as error:
        FolderLock.take(tmp_path)
    assert socket.gethostname() in str(error.value) and sys.argv[0] in str(error.value)
    assert psutil.pid_exists(child.pid) and (tmp_path / LOCK).exists()


def test_a_second_claim_of_the_same_process_is_refused_until_the_first_ends(tmp_path):
    with claim(tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        for folder in (tmp_path, tmp_path / "link"):
            with pytest.raises(ValueError, match="for this run alone"), claim(folder):
                pass
    with claim(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, elsewhere):
    child = elsewhere(tmp_path)
    child.kill()
    child.join()
    assert (tmp_path / LOCK).exists()
    FolderLock.take(tmp_path).release()


def test_workers_that_outlive_a_killed_owner_do_not_keep_its_lock(tmp_path):
    there, here = fork.Pipe()

    def work():
        FolderLock.take(tmp_path)
        if (worker := os.fork()) == 0:
            signal.pause()
        there.send(worker)
        signal.pause()

    owner = fork.Process(target=work, daemon=True)
    owner.start()
    worker = here.recv()
    owner.kill()
    owner.join()
    try:
        assert psutil.pid_exists(worker)
        FolderLock.take(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", '"text"', owner(), owner(host="other"), owner(pid=1)],
    ids=["empty", "cut", "list", "null", "text", "this process", "another host", "process 1"],
)
def test_what_a_file_says_that_nobody_locks_binds_nobody(tmp_path, content):
    """Whoever wrote it is dead, and a living process may have got its number."""
    (tmp_path / LOCK).write_text(content)
    FolderLock.take(tmp_path).release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    ("content", "is_free"),
    [
        ("", True),
        (owner(process_start=1.0), True),  # a dead one, whose number another process has
        (owner(pid=2**22 + 1), True),
        (owner(), False),
        (owner(host="elsewhere"), False),  # who knows
    ],
    ids=["nobody", "reused number", "no such process", "this process", "another host"],
)
def test_without_locks_the_written_owner_decides_unless_it_is_dead(tmp_path, monkeypatch, number, content, is_free):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / LOCK).write_text(content)
    if is_free:
        FolderLock.take(tmp_path).release()
    else:
        with pytest.raises(ValueError, match=f"has no locks: if that process is dead, delete .*{LOCK}"):
            FolderLock.take(tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claims.os, "open", refuse)
    with pytest.raises(ValueError, match=f"may write, got .*{os.strerror(number)}"):
        FolderLock.take(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="Expected a folder that this process may write"):
            FolderLock.take(path)


def test_a_claim_that_ends_in_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), claim(tmp_path / "new", {"seed": 0}, contents=["*.png"]):
        (tmp_path / "new" / "settings.json").unlink()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_settings_bind_only_where_there_is_something_made_with_them(tmp_path):
    def take(**settings):
        with claim(tmp_path, settings, free=["workers"], contents=["*.png"]):
            pass

    take(seed=0)
    take(seed=1)
    (tmp_path / "0.png").touch()
    take(seed=1, workers=4)
    for other in ({"seed": 0}, {"seed": 1, "steps": 4}, {}, {"seed": {"a": 1}}):
        with pytest.raises(ValueError, match="seed: 1 there|steps: None there, 4 now"):
            take(**other)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="0.png.* of unknown settings"):
        take(seed=1)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"seed": 0', "[" * 100_000, b"\xff\xfe"])
def test_damaged_settings_are_named(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"Expected a JSON object in .*settings.json.*use another folder"):
        check_settings(path, {"seed": 0})
