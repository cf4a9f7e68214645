"""When a wait has become long enough to be told of."""

from __future__ import annotations

import math
from typing import final

#: Seconds after which somebody who is waited for is named.
NAME_AFTER_SECONDS = 10.0


@final
class Lateness:
    """Says when to name those who are waited for: ten seconds after the wait began, and then at most once a minute."""

    def __init__(self) -> None:
        self._named: dict[int, float] = {}

    def is_due(self, whom: int, since: float, now: float) -> bool:
        """Return whether to name `whom`, who has been waited for since `since`; if so, it counts as done at `now`."""
        before = self._named.get(whom, -math.inf)
        if now - since <= NAME_AFTER_SECONDS or now - before <= 6 * NAME_AFTER_SECONDS:
            return False
        self._named[whom] = now
        return True
