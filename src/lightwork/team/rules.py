"""What a worker should do next: pure functions of the board's words, the visitor and the roster. Nothing is written.

A step goes through these phases; each ends when all of its pieces are done:

    COMPUTE   micro-batches are claimed, computed and folded. Ends only when every worker has entered the step, too.
    AUDIT     (only in a step that is audited) another worker computes one of them again, and compares.
    EXCHANGE  (only with several hosts) the leader exchanges records and partial sums with the other hosts' leaders.
    MEASURE   (only with clipping or loss scaling) the norm of each bucket's gradient.
    AGREE     (only where each host updates buckets of its own) the leader exchanges these norms.
    UPDATE    buckets are claimed and updated; the last piece of work is the model's buffers.
    GATHER    (only where each host updates buckets of its own) the leader exchanges the new weights.

Which one a step is in is not written anywhere: it is the first that has a piece which is not done.

    [Note: when weights may be written]
    All workers of a host see one copy of the weights, and user code may read them between two steps. So no bucket is
    updated before every micro-batch of the step is done and every worker has entered it. (One that has left its loop
    and waits in a collective call, or has ended, reads none, and need not enter.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lightwork.errors import Disagreement
from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node, fold
from lightwork.team.presence import is_excused
from lightwork.team.words import MAX_WORKERS, OPEN, WORD, BoardSize, Kind, Shape, Words, node_of, opened


class Action(NamedTuple):
    """One piece of work."""

    kind: Kind
    item: int


@dataclass(frozen=True)
class Seat:
    """Who visits the board, and what is the same for it in every step."""

    roster: Roster
    rank: int
    size: BoardSize
    sharded: bool  #: each host updates buckets of its own
    steal: bool  #: micro-batches of late workers are taken over

    @cached_property
    def host(self) -> int:
        """The visitor's host."""
        return self.roster.host_of(self.rank)

    @cached_property
    def local_rank(self) -> int:
        """The visitor's place on it."""
        return self.roster.local_rank(self.rank)

    @cached_property
    def locals(self) -> tuple[int, ...]:
        """The places of the host that are taken."""
        return self.roster.local_ranks(self.host)

    def name(self, local_rank: int) -> int:
        """Return the rank of a worker of this host."""
        return self.roster.rank_of(self.host, local_rank)


class Phase(NamedTuple):
    """A phase of a step on one host."""

    kind: Kind
    pieces: Sequence[int]  #: in the order in which they are claimed
    stretch: slice  #: of the words of this kind: the pieces, but for the buffers


def phases_of(seat: Seat, shape: Shape) -> tuple[Phase, ...]:
    """Return the phases of a step on the visitor's host."""
    roster, size = seat.roster, seat.size
    micro_batches = roster.micro_batches(seat.host, shape.num_micro_batches)
    own = roster.own_buckets(seat.host, size.num_buckets) if seat.sharded else range(size.num_buckets)
    buckets = slice(own.start, own.stop, own.step)
    several = roster.num_hosts > 1
    phases = (
        (True, Phase(Kind.COMPUTE, micro_batches, slice(micro_batches.start, micro_batches.stop))),
        (shape.is_audited, Phase(Kind.AUDIT, (0,), slice(1))),
        (several, Phase(Kind.EXCHANGE, (0,), slice(1))),
        (shape.measures, Phase(Kind.MEASURE, own, buckets)),
        (shape.measures and seat.sharded, Phase(Kind.AGREE, (0,), slice(1))),
        (True, Phase(Kind.UPDATE, (*own, size.num_buckets), buckets)),
        (seat.sharded, Phase(Kind.GATHER, (0,), slice(1))),
    )
    return tuple(phase for is_needed, phase in phases if is_needed)


def next_action(
    words: Words, seat: Seat, step: int, phases: Sequence[Phase], at: int = 0, position: int = 0
) -> tuple[Action, int, int]:
    """Return what the visitor should do in `step`, which is open, and where that was found: phase and position.

    Going on from there the next time finds the same as going from the beginning, sooner: what is claimed stays claimed,
    unless its claimant dies.

    Raises: Disagreement when the workers differ in their settings, or the leader will not come.
    """
    base = (step + 1) * MAX_WORKERS
    while at < len(phases):
        phase = phases[at]
        kind, pieces = phase.kind, phase.pieces
        claims = words.claims[kind]
        if kind is Kind.COMPUTE:
            index = _micro_batch_for(words, seat, step, phase)
            if index is not None:
                return Action(kind, index), at, 0
            if not (is_complete(words, phase, step) and _all_entered(words, seat, step)):
                return _WAIT, at, 0
            _check_settings(words, seat, step)
        elif kind is Kind.AUDIT and _has_company_in_audit(words, seat):
            if not is_complete(words, phase, step):
                return _WAIT, at, 0
        elif kind in _LEADERS and not seat.roster.is_leader(seat.rank):
            if not is_complete(words, phase, step):
                _check_leader_comes(words, seat, step)
                return _WAIT, at, 0
        else:
            while position < len(pieces):
                piece = pieces[position]
                position += 1
                if claims[piece] < base:
                    return Action(kind, piece), at, position
            if not is_complete(words, phase, step):
                return _WAIT, at, position
        at, position = at + 1, 0
    return _COMMITTED, at, 0


def is_complete(words: Words, phase: Phase, step: int) -> bool:
    """Return whether every piece of a phase is done."""
    done = words.done[phase.kind]
    there = bytes(done[phase.stretch])
    if there != (step + 1).to_bytes(WORD, "little") * (len(there) // WORD):
        return False
    return phase.kind is not Kind.UPDATE or done[phase.pieces[-1]] == step + 1


def partial_sums(words: Words, seat: Seat, step: int, num_micro_batches: int) -> dict[Node, tuple[int, int]]:
    """Return where the partial sums of this host lie in `step`, which is open: place and slot, by node.

    A sum counts when all of its micro-batches are done; one that went into another that counts, does not any more.
    After the exchange with other hosts there is the sum of all.
    """
    if words.done[Kind.EXCHANGE][0] == step + 1:
        claimant = words.claimant(Kind.EXCHANGE, 0, step) or 0
        return {Node(0, num_micro_batches): (claimant, seat.size.num_places - 1)}
    done = bytes(words.done[Kind.COMPUTE])
    stamp = (step + 1).to_bytes(WORD, "little")
    places: dict[Node, tuple[int, int]] = {}
    for local in range(seat.size.capacity):  # also of those who died since
        if words.entered(local) != step:  # its slots are of another step
            continue
        for slot, word in enumerate(words.slots_of(local).tolist()):
            if word:
                node = node_of(word)
                if done[node.first * WORD : node.end * WORD] == stamp * (node.end - node.first):
                    places[node] = (local, slot)
    counted: dict[Node, tuple[int, int]] = {}
    end = 0
    for node in sorted(places, key=lambda node: (node.first, -node.end)):  # those within another come after it
        if node.end > end:
            counted[node] = places[node]
            end = node.end
    return counted


def freed_by_death(words: Words, local_rank: int, step: int, phases: Sequence[Phase]) -> list[Action]:
    """Return the pieces of `step` that a worker that died had in hand: nobody else will finish them."""
    return [
        Action(phase.kind, piece)
        for phase in phases
        for piece in phase.pieces
        if words.claimant(phase.kind, piece, step) == local_rank and words.done[phase.kind][piece] != step + 1
    ]


def other_settings(step: int, rank: int, other: int) -> Disagreement:
    """Return the error of two workers whose settings differ."""
    return Disagreement(
        f"at step {step} rank {rank} has other learning rates, optimizer settings, trainable parameters or modules in "
        f"train mode than rank {other}. Schedulers, model.train(), model.eval() and changes of requires_grad must run "
        "on every worker alike."
    )


_LEADERS = (Kind.EXCHANGE, Kind.AGREE, Kind.GATHER)
_WAIT, _COMMITTED = Action(Kind.WAIT, 0), Action(Kind.COMMITTED, 0)


def _micro_batch_for(words: Words, seat: Seat, step: int, phase: Phase) -> int | None:
    """Return the best micro-batch that the visitor can take and still has a slot for."""
    base = (step + 1) * MAX_WORKERS
    claims = words.claims[Kind.COMPUTE]
    if min(claims[phase.stretch].tolist(), default=base) >= base:
        return None
    _, (count, _, _) = opened(words.header[OPEN])
    is_claimed = [word >= base for word in claims[:count].tolist()]
    candidates = seat.roster.choose(seat.rank, is_claimed, steal=seat.steal)
    if not candidates:
        return None
    slots = words.slots_of(seat.local_rank).tolist()
    num_free = slots.count(0) - 1  # but for the sum being made
    if num_free > seat.size.num_spare_slots:
        return candidates[0]
    held = [node_of(word) for word in slots if word]
    folds = next((index for index in candidates if fold(index, count, held)[0]), None)
    if folds is None and seat.roster.generation and num_free > 0:  # who died leaves more than others would have taken
        return candidates[0]
    return folds


def _has_company_in_audit(words: Words, seat: Seat) -> bool:
    """Return whether the visitor has computed what is to be computed again, and another worker is there to do so."""
    return bool(words.proof[1] == seat.local_rank) and len(seat.locals) > 1


def _all_entered(words: Words, seat: Seat, step: int) -> bool:
    # [Note: when weights may be written]
    return all(words.entered(local) >= step or is_excused(words, local) for local in seat.locals)


def _check_settings(words: Words, seat: Seat, step: int) -> None:
    first, *others = (local for local in seat.locals if words.entered(local) >= step)
    for local in others:
        if words.settings(local) != words.settings(first):
            raise other_settings(step, seat.name(local), seat.name(first))


def _check_leader_comes(words: Words, seat: Seat, step: int) -> None:
    leader = seat.roster.leader(seat.host)
    local = seat.roster.local_rank(leader)
    if words.entered(local) < step and is_excused(words, local):
        raise Disagreement(
            f"rank {leader} has left its loop before step {step}, which rank {seat.rank} is in. With several hosts all "
            "workers leave at the same step: decide by what is the same everywhere, such as step.loss or an evaluation."
        )
