# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A run that is told to stop: the first signal is a request, the second one an order."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time

import pytest

from diffusers_tread.claims import claim
from diffusers_tread.files import whole
from diffusers_tread.runs import signals
from diffusers_tread.runs.signals import StopRequest, resume_command, run_command, stopped_cleanly


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture(autouse=True)
def handlers():
    numbers = signals.SIGNALS + signals._HANGUPS
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@BOTH
def test_the_first_signal_is_noted_and_ends_the_run_where_the_loop_says(capfd, number):
    with pytest.raises(SystemExit) as ended, StopRequest(["--output_dir", "run"]) as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), number)
        assert stop.is_due() and stop.is_due()
        stop.end("Saved checkpoint-7")
    assert ended.value.code == 128 + number
    said = capfd.readouterr().err
    assert f"Got {number.name}: finishing this step" in said
    assert "Saved checkpoint-7. To go on: python" in said and "--output_dir run" in said


@BOTH
def test_the_same_call_from_terminal_and_launcher_counts_once(number):
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.is_due()


@BOTH
def test_a_second_signal_stops_at_once(monkeypatch, number):
    monkeypatch.setattr(signals, "_ONE_CALL", 0.01)

    def work():
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.is_due()
            time.sleep(0.02)
            os.kill(os.getpid(), number)
            os._exit(3)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode == -number


@BOTH
def test_forked_workers_leave_the_request_to_their_parent(number):
    def work():
        os.kill(os.getpid(), number)
        os._exit(3)

    with StopRequest() as stop:
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(30)
        assert child.exitcode == (3 if number == signal.SIGINT else -number)  # a parent ends workers by SIGTERM
        assert not stop.is_due()


@BOTH
def test_what_needs_no_checkpoint_ends_cleanly_in_the_middle_of_a_file(tmp_path, capfd, number):
    with pytest.raises(SystemExit) as ended, claim(tmp_path / "out"), stopped_cleanly([], kept="finished images"):
        (tmp_path / "out" / "0.png").touch()
        with whole(tmp_path / "out" / "1.png") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert ended.value.code == 128 + number
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.png"]
    assert f"Stopped by {number.name}; finished images are kept. To go on: python" in capfd.readouterr().err


def test_threads_leave_the_handlers_alone():
    seen = []

    def work():
        with StopRequest() as stop, stopped_cleanly([], kept="nothing"):
            seen.append(stop.is_due())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seed", "3"], "--seed 3"),
        (["--overwrite_output_dir", "--seed=3"], "--seed=3"),
        (["--resume_from_checkpoint", "checkpoint-20", "--lr", "1"], "--lr 1"),
        (["--resume_from_checkpoint=latest", "--output_dir", "my run"], "--output_dir 'my run'"),
        (["--model", '{"layers": 2}'], """--model '{"layers": 2}'"""),
    ],
)
def test_the_command_to_go_on_is_the_same_one_and_neither_deletes_nor_goes_back(argv, expected):
    assert resume_command(argv) == f"python {shlex.quote(sys.argv[0])} {expected}"
    assert resume_command(argv, overrides=["--no-x"]).endswith(f"{expected} --no-x")


WAITS = """
import signal, sys, time
def stop(number, frame):
    print("child ends cleanly", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def heeded():
    """The signals of a terminal are not ignored, as they are for what nohup or a shell's & started."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGQUIT, signal.SIGTERM),
    ],
)
def test_a_script_within_a_script_ends_cleanly_and_the_outer_one_says_how_to_go_on(capfd, heeded, number, told):
    def tell_once_ready():
        while "ready" not in capfd.readouterr().out:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as ended, stopped_cleanly(["--seed", "3"], kept="checkpoints"):
        threading.Thread(target=tell_once_ready).start()
        run_command([sys.executable, "-c", WAITS])
    assert ended.value.code == 128 + told
    said = capfd.readouterr()
    assert "child ends cleanly" in said.out
    assert f"Stopped by {told.name}; checkpoints are kept. To go on: python" in said.err and "--seed 3" in said.err


def test_a_script_within_a_script_that_fails_ends_both_with_its_code():
    with pytest.raises(SystemExit) as ended, stopped_cleanly([], kept="nothing"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3
