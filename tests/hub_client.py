# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs code in processes that see a local Hub, many of them for the price of one import.

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so that a test, which runs offline, cannot
turn to a local server itself. `HubClient` starts one process with the right environment, which imports everything and
then forks for each piece of code.
"""

import json
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

import huggingface_hub


class Result(NamedTuple):
    returncode: int
    """Minus the signal's number for a killed process."""
    output: str
    """Standard output and error."""


class HubClient:
    """Args: url: Of the server. folder: For the caches and outputs."""

    pid: int
    """Of the process that runs now."""

    def __init__(self, url: str, folder: Path):
        self.folder, self.runs = folder, 0
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder), "NO_PROXY": "*"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, code: str, *argv: object, token: str | None = "hf_ant", xet: bool = False, check: bool = True
    ) -> Result:
        """Runs Python code with `sys.argv[1:] = argv` and the token in HF_TOKEN; `check` wants it to end well."""
        self.runs += 1
        output = self.folder / f"output-{self.runs}.txt"
        order = {"code": textwrap.dedent(code), "argv": [str(word) for word in argv], "token": token, "xet": xet}
        self.process.stdin.write(json.dumps(order | {"output": str(output)}) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        result = Result(int(self.process.stdout.readline()), output.read_text())
        assert not check or result.returncode == 0, result.output
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve() -> None:
    """Forks for each order that comes in, and answers with the return code."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    from diffusers import AutoencoderKL  # noqa: F401

    import diffusers_tread.hub  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            execute(order)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def execute(order: dict) -> None:
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if order["token"] is not None:
        os.environ["HF_TOKEN"] = order["token"]
    huggingface_hub.constants.HF_HUB_DISABLE_XET = not order["xet"]
    sys.argv[1:] = order["argv"]
    returncode = 0
    try:
        exec(compile(order["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        returncode = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if returncode == 1:
            print(error.code)
    except BaseException:
        traceback.print_exc()
        returncode = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(returncode)


if __name__ == "__main__":
    serve()
