"""Who this worker is, before there is a run; and one worker before the others: to download, to build a cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from lightwork.errors import RankFailed
from lightwork.spec.roster import FIRST_RANK
from lightwork.team import environment as environments
from lightwork.team import finding
from lightwork.team.rendezvous import Rendezvous

#: Seconds that workers wait for the first one, unless told otherwise.
FIRST_TIMEOUT = 3600.0


def rank() -> int:
    """Return this worker's number, from 0: what `run.rank` will be. 0 in a script that nobody launched."""
    return environments.read().rank


def world_size() -> int:
    """Return the number of workers: what `run.world_size` will be."""
    return environments.read().world_size


@contextlib.contextmanager
def first(*, timeout: float = FIRST_TIMEOUT) -> Iterator[None]:
    """Let one worker run the body of the `with` first; then the first of each other machine; then all the others.

    What the first one has downloaded or cached is there for the others. Every worker comes here, as often as the
    others; within a run or before `distribute`.

    Args:
        timeout: seconds that the others wait.

    Blocks: the others, until the first has left the body.
    Raises: RankFailed where the first one's body raised; TeamError after `timeout`.
    """
    environment = environments.read()
    rendezvous = finding.find(environment)
    key = f"first/{rendezvous.next_first()}"
    of_machine = f"{key} on {environment.machine}"
    if environment.rank == FIRST_RANK:
        rendezvous.comes_first(of_machine)
        tells = [of_machine, key]
    else:
        _wait(rendezvous, key, timeout)
        tells = [of_machine] if rendezvous.comes_first(of_machine) else []
        if not tells:
            _wait(rendezvous, of_machine, timeout)
    problem = f"rank {environment.rank} has left it"
    try:
        yield
        problem = ""
    except BaseException as error:
        problem = f"rank {environment.rank} failed in it with {type(error).__name__}: {error}"
        raise
    finally:
        for told in tells:
            rendezvous.publish(told, json.dumps(problem))


def _wait(rendezvous: Rendezvous, key: str, timeout: float) -> None:
    problem = json.loads(rendezvous.wait_for_message(key, "leave `with lightwork.first():`", timeout))
    if problem:
        raise RankFailed(f"`with lightwork.first():` can not go on: {problem}. See the log of that worker.")
