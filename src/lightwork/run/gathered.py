"""What the micro-batches of a step gave to `step.gather` and `step.sum`, from all workers.

Hosts of one worker each send it with the records of the step, before its update: who is lost then has given it to all,
or the step is computed again. Else workers meet for it after the step, and what one had that has died is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightwork.checkpoint.packing import pack, unpack
from lightwork.errors import RankLost
from lightwork.run.collected import Part, from_values, to_values
from lightwork.team.team import Team

#: By micro-batch and name.
Parts = Mapping[int, Mapping[str, Part]]


def packed(parts: Parts) -> bytes:
    """Return what one worker has, as it travels; nothing if no micro-batch gave anything."""
    return pack(to_values(parts)) if any(parts.values()) else b""


def parts_of_all(
    own: Parts, here: Sequence[bytes] | None, team: Team, step: int, num_micro_batches: int
) -> Iterable[dict[int, dict[str, Part]]]:
    """Return what each worker has; `here` is what hosts have sent, if they have.

    Raises: RankLost when a part of it is lost.
    """
    if here is not None:  # nothing is lost; who gave nothing has sent nothing
        nothing: dict[int, dict[str, Part]] = {index: {} for index in range(num_micro_batches)}
        return [nothing, *(from_values(unpack(one)) for one in here if one)]
    payloads = team.meet(f"step.gather (step {step})", pack(to_values(own)))
    received = [from_values(unpack(payload)) for payload in payloads]
    lost = set(range(num_micro_batches)).difference(*received)
    if lost:
        raise RankLost(
            f"what micro-batches {sorted(lost)[:5]} of step {step} gave to step.gather or step.sum is lost with the "
            "worker that computed them, which has died. Start again, to go on from the last checkpoint."
        )
    return received
