# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Stops a run cleanly on SIGTERM or SIGINT, so that the same command resumes it."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
import torch.distributed
from accelerate import PartialState

from ..installation import NAME


SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_CALL = 1.0  # seconds; a repeated signal within them is the same one, passed on by terminal and launcher
# A closed terminal and Ctrl-\, where the system has them.
_HANGUPS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))


class StopRequest:
    """Records the first SIGTERM or SIGINT, for the training loop to stop at; a second one kills the process at once.

    Use it as a context manager, in all processes together. Signals are handled in the main thread only; in other
    threads nothing changes.

    Args:
        argv: The script's arguments; None for those of this process.
        overrides: Flags to add to the command that resumes the run, to override those of a config file.
    """

    def __init__(self, argv: Sequence[str] | None = None, *, overrides: Sequence[str] = ()):
        self.argv, self.overrides, self.signal = argv, overrides, None
        self._time, self._pid = 0.0, os.getpid()
        self._group, self._vote, self._work = None, None, None

    def __enter__(self) -> "StopRequest":
        if PartialState().num_processes > 1 and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")
        self._before = _replace_handlers(dict.fromkeys(SIGNALS, self._handle))
        return self

    def __exit__(self, *error) -> None:
        _replace_handlers(self._before)
        if self._work is not None:
            if error[0] is None:
                self._work.wait()
            self._work = None

    def is_due(self) -> bool:
        """Whether to stop after this step; the same answer in all processes, which call this together once per step.

        The processes exchange their votes on the CPU while the next step runs, so that no process waits; the answer
        is known one step later.
        """
        if self._group is None:
            return self.signal is not None

        # The vote of the step before.
        is_due = False
        if self._work is not None:
            self._work.wait()
            is_due = bool(self._vote.item())

        # A new vote.
        if not is_due:
            self._vote = torch.tensor(self.signal or 0)
            options = {"op": torch.distributed.ReduceOp.MAX, "group": self._group, "async_op": True}
            self._work = torch.distributed.all_reduce(self._vote, **options)
        else:
            self.signal, self._work = int(self._vote.item()), None
        return is_due

    def end(self, done: str) -> NoReturn:
        """Ends the run after `is_due` returned True.

        Args:
            done: What has been saved, as a sentence without full stop.

        Raises:
            SystemExit: With code 128 plus the signal's number, as shells report it.
        """
        _say(f"{done}. To go on: {resume_command(self.argv, overrides=self.overrides)}")
        raise SystemExit(128 + (self.signal or 0))

    def _handle(self, number: int, frame) -> None:
        if os.getpid() != self._pid:  # a forked worker, which its parent stops
            if number == signal.SIGTERM:
                _stop_at_once(number)
            return
        if self.signal is None:
            self.signal, self._time = number, time.monotonic()
            _say(
                f"Got {signal.Signals(number).name}: finishing this step and saving a checkpoint. Again stops at once."
            )
        elif time.monotonic() - self._time > _ONE_CALL:
            _stop_at_once(number)


@contextmanager
def stopped_cleanly(argv: Sequence[str] | None, *, kept: str) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into a clean exit that leaves nothing half-written and prints how to resume.

    Args:
        argv: The script's arguments; None for those of this process.
        kept: Finished work that the same command will not repeat, such as "finished batches".

    Raises:
        SystemExit: After a signal, with code 128 plus its number, as shells report it.
    """
    pid = os.getpid()

    def handle(number: int, frame) -> None:
        if os.getpid() != pid:
            if number == signal.SIGTERM:
                _stop_at_once(number)
            return
        _replace_handlers(before)  # a second signal stops the process at once
        raise _Stopped(number)

    before = _replace_handlers(dict.fromkeys(SIGNALS, handle))
    try:
        yield
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        _say(f"Stopped by {name}; {kept} are kept. To go on: {resume_command(argv)}")
        raise SystemExit(128 + stopped.number) from None
    finally:
        _replace_handlers(before)


def run_command(command: Sequence[str], **options: Any) -> None:
    """Runs a script that handles SIGTERM and SIGINT itself. Call it inside `stopped_cleanly`.

    The signals are passed on to the script, SIGHUP (unless it is ignored, as by nohup) and SIGQUIT as SIGTERM, and its
    end is waited for; `subprocess.run` would kill it. If this is not called from the main thread, the script only gets
    signals from the terminal.

    Args:
        command: Program and arguments.
        **options: Further arguments of `subprocess.Popen`.

    Raises:
        SystemExit: With the script's exit code if it is not 0. After a signal, `stopped_cleanly` says how to resume.
    """
    is_main = threading.current_thread() is threading.main_thread()
    process = subprocess.Popen(command, start_new_session=is_main, **options)  # else the terminal would signal it too

    def pass_on(number: int, frame) -> None:
        process.send_signal(number if number in SIGNALS else signal.SIGTERM)

    hangups = [number for number in _HANGUPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = _replace_handlers(dict.fromkeys([*SIGNALS, *hangups], pass_on))
    try:
        code = process.wait()
    finally:
        _replace_handlers(before)
    for number in SIGNALS:
        if code in (128 + number, -number):
            raise _Stopped(number)
    if code:
        raise SystemExit(code)


def resume_command(argv: Sequence[str] | None, *, overrides: Sequence[str] = ()) -> str:
    """The command that resumes a stopped run: the same, without --overwrite_output_dir and --resume_from_checkpoint.

    Args:
        argv: The script's arguments; None for those of this process.
        overrides: Flags to add.
    """
    kept, words = [], iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        name = word.partition("=")[0]
        if name == "--resume_from_checkpoint":
            if "=" not in word:
                next(words, None)
        elif name != "--overwrite_output_dir":
            kept.append(word)
    return shlex.join([*_program(PartialState().num_processes), *map(str, kept), *overrides])


def _program(num_processes: int) -> list[str]:
    """The command that started this process, without its flags."""
    script, launcher = [sys.argv[0]], ["python"]
    if num_processes > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(num_processes)]
    if sys.argv[0].startswith(f"{NAME} "):  # a task of cli.py
        task = sys.argv[0].split()[1]
        script, launcher = (["-m", "diffusers_tread", task], launcher) if num_processes > 1 else ([NAME, task], [])
    return [*launcher, *script]


class _Stopped(BaseException):
    """A signal arrived. It is a BaseException, so that `except Exception` does not catch it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _replace_handlers(handlers: dict) -> dict:
    """Sets signal handlers and returns the old ones; does nothing outside of the main thread, as Python requires."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def _stop_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(text: str) -> None:
    """Writes to stderr from the main process, bypassing buffers that the signal may have interrupted."""
    if PartialState().is_main_process:
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"\n{text}\n".encode())
