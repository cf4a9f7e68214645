"""The store of torch's at which workers of several machines meet: served by rank 0, looked for by the others."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from lightwork.errors import TeamError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"

#: Seconds that a worker waits for rank 0 before it says so and gives up.
JOIN_TIMEOUT = 300.0


def connect(address: str, port: int, *, serves: bool) -> TCPStore:
    """Return the store at an address; with `serves`, begin to serve it.

    Raises: TeamError when it can not be had.
    """
    from torch._C._distributed_c10d import TCPStore

    _check_name(address)
    make = functools.partial(
        TCPStore, address, port, is_master=serves, timeout=timedelta(seconds=JOIN_TIMEOUT), wait_for_workers=False
    )
    return _within(JOIN_TIMEOUT, make, address, port)


def serve_on_loopback(port: int) -> TCPStore:
    """Return a store that processes of this machine alone can reach. (A TCPStore by itself listens to all networks.)

    Raises: TeamError when the port is taken; 0 is any.
    """
    from torch._C._distributed_c10d import TCPStore

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise TeamError(
            f"port {port}, where the workers are to find each other, can not be had ({error.strerror}): another job "
            "may have it. Set MASTER_PORT to a free one."
        ) from error
    return TCPStore(
        LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=JOIN_TIMEOUT),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _check_name(address: str) -> None:
    """Raise TeamError when a name is no host's; the store itself would look for it again and again."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise TeamError(
            f"MASTER_ADDR={address} is not the name or address of a machine that this one knows ({error.strerror}). "
            "Set it to that of the machine of rank 0, as `hostname -f` says there."
        ) from error


def _within(seconds: float, connect: Callable[[], TCPStore], address: str, port: int) -> TCPStore:
    """Return what `connect` returns.

    Its own time limit does not end its waiting for somebody who takes the connection and says nothing.

    Raises: TeamError when it raises, or has not returned after `seconds`.
    """
    made: list[TCPStore | Exception] = []

    def work() -> None:
        try:
            made.append(connect())
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=work, name="lightwork rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    store = made[0] if made else None
    if store is None or isinstance(store, Exception):
        why = "nobody answers" if store is None else str(store).splitlines()[0]
        raise TeamError(
            f"the workers can not find each other at {address}:{port} ({why}): rank 0 is not there, or another program "
            "has the port. Set MASTER_ADDR to the machine of rank 0, and MASTER_PORT to a free port of it."
        ) from store
    return store
