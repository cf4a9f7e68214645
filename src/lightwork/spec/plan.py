"""The plan: everything that can not change a bit of the result. It may be chosen freely, and changed at any step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from lightwork.errors import SpecError

Memory = Literal["anonymous", "file"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a spec is carried out. JSON both ways, diffable."""

    world_size: int = 1  #: workers; the launcher's business alone
    transport: Literal["host"] = "host"  #: the workers of one host read each other's memory
    shared_memory: Memory = "anonymous"  #: an anonymous memory file, or an unlinked temporary one where there are none
    steal: bool = True  #: a worker that is done takes micro-batches that a late one has not started
    trace: bool = True  #: spans and counters of each worker in the run directory

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise SpecError(f"world_size={self.world_size} is not a positive whole number.")
        for name, switch in (("steal", self.steal), ("trace", self.trace)):
            if not isinstance(switch, bool):
                raise SpecError(f"{name}={switch!r} is neither true nor false.")
        if self.transport != "host":
            raise SpecError(f"transport={self.transport!r} is not known. Choose host.")
        if self.shared_memory not in get_args(Memory):
            raise SpecError(
                f"shared_memory={self.shared_memory!r} is not known. Choose one of {', '.join(get_args(Memory))}."
            )

    def to_json(self) -> str:
        """Return the plan as a JSON object, keys sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises: SpecError when a field is unknown or impossible.
        """
        values = json.loads(text)
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise SpecError(f"the plan has fields that this version does not know: {', '.join(sorted(unknown))}.")
        return cls(**values)
