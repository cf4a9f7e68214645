"""Which rendezvous a worker has: that of its launcher, one for all that the process asks for."""

from __future__ import annotations

import functools
import os

from lightwork.team.environment import Environment
from lightwork.team.page import FileRendezvous
from lightwork.team.rendezvous import Rendezvous, SoloRendezvous, StoreRendezvous


def find(environment: Environment) -> Rendezvous:
    """Return the rendezvous that this worker's launcher offers: one for all that this process asks for."""
    if environment.world_size == 1 and environment.rendezvous_fd is None:
        return SoloRendezvous()
    return _found(environment, os.getpid())


@functools.lru_cache(maxsize=1)
def _found(environment: Environment, pid: int) -> Rendezvous:
    if environment.rendezvous_fd is not None:
        return FileRendezvous(environment.rendezvous_fd, environment.rank)
    return StoreRendezvous(environment)
