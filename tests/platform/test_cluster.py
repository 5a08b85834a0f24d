"""Which Ray cluster a command works on."""

from __future__ import annotations

import socket

import pytest

from setwise.platform import cluster
from setwise.platform.errors import UnreachableError


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UnreachableError, match=f"no Ray cluster at 127.0.0.1:{port}: "), cluster.connect():
        pass
