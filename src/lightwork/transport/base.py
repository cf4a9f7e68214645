"""The contract of a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

#: Called while waiting, some times a second; raises when waiting has become pointless.
Watch = Callable[[], None]


class Transport(ABC):
    """Moves small messages between all workers of a team.

    Gradients do not pass here: on a host they are read in place.
    """

    @abstractmethod
    def exchange(self, what: str, payload: bytes, watch: Watch) -> list[bytes]:
        """Return every worker's payload, by rank. Also a barrier: nobody leaves before all have entered.

        `what` names the call, such as "save"; all must agree on it.

        Moves: the payload of each worker, once, to each other.
        Blocks: until all have called, while `watch` does not raise.
        Raises: Disagreement when another worker exchanges something else.
        """
