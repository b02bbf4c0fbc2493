# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Processes as a launcher starts them, without a new interpreter and its imports for each."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable


def run_forked(work: Callable[[int], None], *, processes: int = 1, kill_after: float | None = None) -> int:
    """Calls `work(rank)` in forked processes, which see the environment that torchrun gives them.

    Returns:
        0 if all end well; else the exit code of the first that does not (minus the signal's number), after which the
        others are killed, as a launcher does. `kill_after` so many seconds all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = [_start(work, rank, processes, port) for rank in range(processes)]
    if kill_after is not None:
        time.sleep(kill_after)
        for child in children:
            os.kill(child, signal.SIGKILL)

    # One that is killed may take others with it before this looks: what counts is the strongest sign of a death.
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] == 0:
            continue
        for other in children:
            gone, status = os.waitpid(other, os.WNOHANG)
            if gone:
                codes.append(os.waitstatus_to_exitcode(status))
            else:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
        children = []
    return max(codes, key=abs)


def _start(work: Callable[[int], None], rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
