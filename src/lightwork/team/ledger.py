"""What a step came to: of each micro-batch its loss, weight, metrics, vote and which parameters it touched, and of each
bucket the norm of its gradient; and how hosts tell each other.

    [Note: what a late worker may read]
    A worker may still be leaving a step while the others are in the next one. They can not finish that without it: its
    micro-batches end only when every worker has entered it ([Note: when weights may be written]). So nobody is two
    steps ahead, and two sets used in turn are enough for what is written while micro-batches are computed: outcomes,
    votes and metrics. (So they are for the loss scale of the next step, which is written as this one ends.) Norms need
    one set: they are written after all have entered. Which parameters a micro-batch touched, and where partial sums
    lie, is read only by who holds a claim, so that the step stays open.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lightwork.errors import UsageError
from lightwork.team.rules import Seat, other_settings
from lightwork.team.words import METRICS_BYTES, Words

#: What a worker may wish of all for the end of a step: to stop, as it was interrupted; to save, as it is time. Flags.
STOP, SAVE = 1, 2

#: Whether more steps follow, and what the worker wishes.
_VOTES: tuple[tuple[bool | None, int], ...] = tuple(
    (goes_on, wishes) for wishes in range(4) for goes_on in (None, False, True)
)
_VOTE_OF = {vote: number for number, vote in enumerate(_VOTES)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a micro-batch came to."""

    loss: float
    weight: float
    metrics: bytes = b""  #: a JSON object: by name, some numbers
    goes_on: bool | None = None  #: its vote, whether more steps follow; None for none
    wishes: int = 0  #: of its worker, for the end of the step
    square: float = math.nan  #: the squared norm of a part of its gradient, where that is asked for


@final
class Ledger:
    """The outcomes on the board of one host."""

    def __init__(self, words: Words, seat: Seat) -> None:
        self._words = words
        self.seat = seat
        self._size = words.size

    def write_outcome(self, step: int, index: int, outcome: Outcome) -> None:
        """Write down what a micro-batch came to; it counts once the micro-batch is done.

        Raises: UsageError when the metrics have not enough room.
        """
        if len(outcome.metrics) > METRICS_BYTES - 8:
            raise UsageError(
                f"the metrics of micro-batch {index} of step {step} take {len(outcome.metrics)} bytes, more than "
                f"{METRICS_BYTES - 8}. step.add is for a few numbers; step.gather takes any amount."
            )
        words, at = self._words, self._row(step) + index
        words.outcomes[2 * at], words.outcomes[2 * at + 1] = outcome.loss, outcome.weight
        words.squares[at] = outcome.square
        words.votes[at] = _VOTE_OF[outcome.goes_on, outcome.wishes]
        text = len(outcome.metrics).to_bytes(8, "little") + outcome.metrics
        words.metrics[at * METRICS_BYTES : at * METRICS_BYTES + len(text)] = text

    def records(self, step: int, num_micro_batches: int) -> list[tuple[float, float]]:
        """Return loss and weight of each micro-batch."""
        at = self._row(step) * 2
        flat = self._words.outcomes[at : at + 2 * num_micro_batches].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def squares(self, step: int, num_micro_batches: int) -> list[float]:
        """Return the squared norm of a part of each micro-batch's gradient, NaN where nobody has looked."""
        at = self._row(step)
        return list(self._words.squares[at : at + num_micro_batches])

    def metrics(self, step: int, index: int) -> dict[str, list[float]]:
        """Return the numbers of each metric of a micro-batch."""
        text = self._metrics(step, index)
        return json.loads(text) if text else {}

    def goes_on(self, step: int, num_micro_batches: int) -> bool | None:
        """Return whether another step follows: whether all micro-batches that voted say so; None if none voted."""
        votes = {vote for vote, _ in self._votes(step, range(num_micro_batches))} - {None}
        return False not in votes if votes else None

    def wishes(self, step: int, num_micro_batches: int) -> int:
        """Return what workers wish for the end of the step."""
        return functools.reduce(operator.or_, (wishes for _, wishes in self._votes(step, range(num_micro_batches))))

    def touched(self, index: int) -> memoryview:
        """Return a byte for each parameter, its claimant's to write: whether micro-batch `index` gave it a gradient."""
        size = self._size.num_parameters
        return self._words.touched[index * size : (index + 1) * size]

    def write_norm(self, bucket: int, norm_squared: float) -> None:
        """Write down the norm of a bucket of this host."""
        self._words.norms[bucket] = norm_squared

    def norms_squared(self) -> list[float]:
        """Return the squared gradient norm of each bucket."""
        return list(self._words.norms)

    # --- between hosts --------------------------------------------------------------------------------------------

    def share_of_step(self, step: int, num_micro_batches: int) -> bytes:
        """Return all that other hosts need to know of this host's micro-batches."""
        own = self.seat.roster.micro_batches(self.seat.host, num_micro_batches)
        return json.dumps(
            {
                "settings": self._words.settings(self.seat.local_rank),
                "records": self.records(step, num_micro_batches)[own.start : own.stop],
                "squares": self.squares(step, num_micro_batches)[own.start : own.stop],
                "votes": self._votes(step, own),
                "metrics": [self._metrics(step, index).decode() for index in own],
                "touched": b"".join(bytes(self.touched(index)) for index in own).hex(),
            }
        ).encode()

    def take_share(self, step: int, num_micro_batches: int, host: int, share: bytes) -> None:
        """Write down what another host's leader says of its micro-batches.

        Raises: Disagreement when its settings differ.
        """
        values = json.loads(share)
        roster = self.seat.roster
        if values["settings"] != self._words.settings(self.seat.local_rank):
            raise other_settings(step, roster.leader(host), self.seat.rank)
        touched = bytes.fromhex(values["touched"])
        count = self._size.num_parameters
        for position, index in enumerate(roster.micro_batches(host, num_micro_batches)):
            loss, weight = values["records"][position]
            metrics, (goes_on, wishes) = values["metrics"][position].encode(), values["votes"][position]
            square = values["squares"][position]
            outcome = Outcome(loss=loss, weight=weight, metrics=metrics, goes_on=goes_on, wishes=wishes, square=square)
            self.write_outcome(step, index, outcome)
            self.touched(index)[:] = touched[position * count : (position + 1) * count]

    def take_norms(self, host: int, norms_squared: Sequence[float]) -> None:
        """Write down the norms of the buckets of another host, of which `norms_squared` holds all."""
        for bucket in self.seat.roster.own_buckets(host, self._size.num_buckets):
            self._words.norms[bucket] = norms_squared[bucket]

    def _row(self, step: int) -> int:
        """Return the first record of a step's set: [Note: what a late worker may read]."""
        return step % 2 * self._size.num_micro_batches

    def _votes(self, step: int, indices: range) -> list[tuple[bool | None, int]]:
        at = self._row(step)
        return [_VOTES[vote] for vote in self._words.votes[at + indices.start : at + indices.stop]]

    def _metrics(self, step: int, index: int) -> bytes:
        at = (self._row(step) + index) * METRICS_BYTES
        length = int.from_bytes(self._words.metrics[at : at + 8], "little")
        return bytes(self._words.metrics[at + 8 : at + 8 + length])
