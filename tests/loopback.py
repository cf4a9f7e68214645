"""Connections over the loopback, between hosts of one process or of several."""

from __future__ import annotations

import itertools
import socket


def over_loopback() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calling = socket.create_connection(server.getsockname())
        return calling, server.accept()[0]


def connected(num_hosts: int) -> list[dict[int, socket.socket]]:
    """Return the ends of connections between all hosts, by host and other host."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(num_hosts)]
    for one, other in itertools.combinations(range(num_hosts), 2):
        ends[one][other], ends[other][one] = over_loopback()
    return ends
