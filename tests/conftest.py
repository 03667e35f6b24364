"""What every test stands on."""

import os
import socket

import pytest

# Tests run side by side, one a core. Before torch is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def free_port() -> int:
    """A port on the loopback address that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
