# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lets the tests import the helpers beside them; runs examples that see the server as the Hub."""

import json
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples")]
# Each of the given command lines in turn, as a process of its own would do.
RUN_EXAMPLE = """
    import importlib, json, sys
    import datasets
    from accelerate.state import AcceleratorState, GradientState

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 s at the end of each epoch of streamed Parquet files
    script = importlib.import_module(sys.argv[1])
    for line in json.loads(sys.argv[2]):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        script.main(line)
"""


@pytest.fixture(scope="session")
def run_example(hub_client):
    """Runs an example, once for each command line that is given."""

    def run(script, *lines, **options):
        lines = json.dumps([[str(word) for word in line] for line in lines])
        return hub_client.run(RUN_EXAMPLE, script, lines, **options)

    return run
