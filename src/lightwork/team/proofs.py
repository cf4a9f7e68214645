"""Micro-batches that two workers compute, and compare: by a newcomer in its first step, or every so many steps.

Who computes the first micro-batch of such a step writes down what it came to, before that is added to others. Another
worker computes it again from the same state, and leaves nothing of it: in a phase of the step, or, a newcomer, while it
holds the claim of a micro-batch, so that weights are what they were. Where they differ the two scripts do not do the
same, an operation is not deterministic, or a machine fails.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, final

from lightwork.errors import TeamError
from lightwork.team.membership import Membership
from lightwork.team.presence import Signal
from lightwork.team.words import LEFT, OPEN, OWES, PRESENCE_WORDS, PROOF_WORDS, PROVEN, Kind, Words, opened
from lightwork.transport.mailboxes import WATCH_SECONDS

#: More micro-batches than a step has: a step and one of them are one word.
_MICRO_BATCHES = 1 << 32


class Proof(NamedTuple):
    """What a micro-batch came to, as integers: of equal bits."""

    micro_batch: int
    loss: int
    weight: int
    gradients: tuple[int, ...]  #: by parameter


@final
class Proofs:
    """Those of a host's team, as one worker sees them."""

    def __init__(
        self,
        words: Words,
        membership: Membership,
        local_rank: int,
        lock: AbstractContextManager[bool | None],
        signal: Signal,
        *,
        steal: bool,
    ) -> None:
        self._words = words
        self._membership = membership
        self._local_rank = local_rank
        self._at = local_rank * PRESENCE_WORDS + OWES
        self._lock = lock
        self._signal = signal
        self._steal = steal

    @property
    def is_owed(self) -> bool:
        """Whether this worker has to compare before it computes: a newcomer."""
        return bool(self._words.presence[self._at])

    def pay(self) -> None:
        """Take note that this worker computes what others do."""
        self._words.presence[self._at] = 0

    def want(self, step: int) -> None:
        """Let somebody write down what a micro-batch of `step` comes to, also where the step is not audited."""
        self._words.header[PROVEN] = step + 1

    def is_wanted(self, step: int) -> bool:
        """Return whether a proof of `step` is wanted, and not there."""
        open_step, shape = opened(self._words.header[OPEN])
        is_audited = shape.is_audited and open_step == step
        return (is_audited or bool(self._words.header[PROVEN] == step + 1)) and self.of(step) is None

    def give(self, step: int, proof: Proof) -> None:
        """Write a proof down, unless another worker was first."""
        words = self._words.proof
        with self._lock:
            if self.is_wanted(step):
                for at, value in enumerate((self._local_rank, proof.loss, proof.weight, *proof.gradients), 1):
                    words[at] = value
                words[0] = (step + 1) * _MICRO_BATCHES + proof.micro_batch
                self._signal.notify()

    def of(self, step: int) -> Proof | None:
        """Return the proof of `step`, None while there is none."""
        words = self._words.proof
        of_step, micro_batch = divmod(words[0], _MICRO_BATCHES)
        if of_step != step + 1:
            return None
        return Proof(int(micro_batch), int(words[2]), int(words[3]), tuple(words[PROOF_WORDS:].tolist()))

    def is_own(self) -> bool:
        """Return whether this worker has given the last proof."""
        return bool(self._words.proof[1] == self._local_rank)

    def wait(self, step: int, look: Callable[[], TeamError | None]) -> Proof | None:
        """Return the proof of `step` when there is one; None where nobody is left who would give it.

        Where all who are there owe one, the first of them has nobody to compare with, and the others do with it.

        Raises: what `look` returns, called now and then.
        """
        while True:
            seen = self._signal.value
            proof = self.of(step)
            if proof is not None:
                return proof
            others = self._others()
            if min(others, default=self._local_rank) >= self._local_rank and all(map(self._owes, others)):
                self.want(step)
                self.pay()
                return None
            if not self._may_come(step):
                return None
            if not self._signal.wait_for_change(seen, WATCH_SECONDS):
                reason = look()
                if reason is not None:
                    raise reason

    def deaths(self, step: int, micro_batch: int) -> int:
        """Return how many workers died while they had a micro-batch of `step`, which is open."""
        return self._words.deaths(step, micro_batch)

    def _others(self) -> list[int]:
        """Return the places of the others that are in, and in their loops."""
        presence = self._words.presence
        return [local for local in self._membership.others() if not presence[local * PRESENCE_WORDS + LEFT]]

    def _owes(self, local_rank: int) -> bool:
        return bool(self._words.presence[local_rank * PRESENCE_WORDS + OWES])

    def _may_come(self, step: int) -> bool:
        """Return whether another worker has, or may still take, a micro-batch of `step`."""
        words = self._words
        _, (count, _, _) = opened(words.header[OPEN])
        open_ones = [index for index in range(count) if words.done[Kind.COMPUTE][index] != step + 1]
        claimants = {words.claimant(Kind.COMPUTE, index, step) for index in open_ones}
        return bool(claimants - {self._local_rank} - (set() if self._steal else {None}))


def as_integer(value: float) -> int:
    """Return the bits of a number."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)
