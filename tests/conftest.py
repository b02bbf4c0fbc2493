# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What every test starts from, one thread and a fixed seed, and a Hub for those that want one."""

import re
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent))
from hub_client import HubClient  # noqa: E402
from hub_server import HubServer  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest test comes first: at the end, one worker would wait for it."""
    items.sort(key=lambda item: not item.name.endswith("with_the_wheel_alone"))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Makes a test's random numbers independent of the tests that ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerate():
    """Accelerate as in a process that has not used it, before and after."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def hub_session(tmp_path_factory):
    """The server, for the tests of one worker."""
    server = HubServer(tmp_path_factory.mktemp("xet"))
    yield server
    server.close()


@pytest.fixture
def hub_server(hub_session):
    """A server that speaks the Hub's protocol; repositories of other tests are there, their faults are not."""
    hub_session.reset()
    yield hub_session
    hub_session.reset()  # for fixtures of whole modules, which come before a test's own


@pytest.fixture(scope="session")
def hub_client(hub_session, tmp_path_factory):
    """Runs code that sees the server as the Hub."""
    client = HubClient(hub_session.url, tmp_path_factory.mktemp("hub"))
    yield client
    client.close()


@pytest.fixture
def repo_id(request):
    """The name of a repository that no other test uses."""
    return f"ant/{re.sub('[^a-z0-9]+', '-', request.node.name)}".rstrip("-")
