"""The roster: who is in the team."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The members by rank; `generation` counts the changes of who is in."""

    generation: int
    members: tuple[Member, ...]

    def to_json(self) -> str:
        """Return the roster as a JSON object."""
        return json.dumps(asdict(self), indent=2)
