"""What every test stands on: one thread, no network, hypothesis profiles, and CUDA tests only where a GPU is."""

import os
import signal
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

from minivlm.console import note_once

torch.set_num_threads(1)
# A shell starts its background jobs deaf to Ctrl-C, and they pass that on: tests of Ctrl-C must hear it all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # no test asserts a time
settings.register_profile("default", max_examples=30, derandomize=True, **QUIET)  # the same cases on every machine
settings.register_profile("deep", max_examples=10_000, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def loopback_only():
    """A test that reaches for the network fails here, with the address, and not on the one machine that has none."""
    connect = socket.socket.connect

    def connect_nearby(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(sock, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_nearby)
        yield


@pytest.fixture(autouse=True)
def nothing_was_told():
    """What is told once is told once in every test."""
    note_once.cache_clear()
