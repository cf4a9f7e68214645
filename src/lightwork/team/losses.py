"""The hosts that a team has lost, in words of the board: from which step on it goes on without each."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import final

from lightwork.team.words import CHANGES, Words


@final
class Losses:
    """The hosts that are lost, as one of those that go on knows them."""

    def __init__(self, words: Words, lock: AbstractContextManager[bool | None]) -> None:
        self._words = words
        self._lock = lock

    def before(self, step: int) -> tuple[int, ...]:
        """Return the hosts that take no part in `step`."""
        since = self._words.gone.tolist()
        return tuple(host for host, word in enumerate(since) if 0 < word <= step + 1) if any(since) else ()

    def add(self, hosts: Collection[int], step: int) -> None:
        """Go on without these hosts, from `step` on."""
        with self._lock:
            for host in hosts:
                self._words.gone[host] = self._words.gone[host] or step + 1
            self._words.header[CHANGES] += 1
