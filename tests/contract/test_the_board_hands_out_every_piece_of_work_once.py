"""The claims board, driven by fake workers in one process, each as fast or slow as the test says.

The workers are generators that yield between a claim and its report, and a seed decides whose turn it is: any
interleaving of visits can happen, and one that fails can be had again. Another test lets real threads race.
"""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightwork.errors import Disagreement, RankFailed, UsageError
from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node, fold, spare_partial_sums, sum_of
from lightwork.store.private import PrivateStore
from lightwork.team import membership as memberships
from lightwork.team.board import Board
from lightwork.team.ledger import Ledger, Outcome
from lightwork.team.membership import Membership
from lightwork.team.presence import Activity
from lightwork.team.proofs import Proof
from lightwork.team.rules import Action, freed_by_death, partial_sums, phases_of
from lightwork.team.words import METRICS_BYTES, PRESENCE_WORDS, READY, BoardSize, Kind, Shape, slot_word
from lightwork.transport.signal import Signal

_SIGNAL_BYTES = 64

MAX_TURNS = 1_000_000
#: Of workers that die at any word: seconds here, or as many as one has time for.
NUM_SCHEDULES = int(os.environ.get("LIGHTWORK_SCHEDULES", "800"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A team, its steps, and how late each worker is."""

    world_size: int
    num_micro_batches: int
    num_buckets: int = 3
    num_steps: int = 3
    clip: bool = False
    audit_every: int = 0
    steal: bool = True
    speeds: tuple[int, ...] = ()  #: by rank: turns that it gets for each one of a worker of speed 1
    seed: int = 0

    def audits(self, step: int) -> bool:
        return self.audit_every > 0 and step % self.audit_every == 0

    def size(self) -> BoardSize:
        return BoardSize(
            capacity=self.world_size,
            num_micro_batches=self.num_micro_batches,
            num_parameters=2,
            num_buckets=self.num_buckets,
            num_spare_slots=spare_partial_sums(self.num_micro_batches),
        )

    def maker(self, lock: threading.Lock | None = None) -> Callable[[int], Board]:
        """Return what makes a board for a rank, all in one memory."""
        size = self.size()
        store = PrivateStore(_SIGNAL_BYTES + Board.num_bytes(size))
        region = memoryview(store.buffer)[_SIGNAL_BYTES:]
        shared, signal = lock or threading.Lock(), Signal(store.buffer, 0)
        first = Roster.of_sizes((self.world_size,))
        return lambda rank: Board(rank, first, size, region, shared, signal, steal=self.steal)

    def boards(self) -> list[Board]:
        return list(map(self.maker(), range(self.world_size)))


@dataclass
class StepLog:
    """What happened in one step; filled in by all workers."""

    entered: set[int] = field(default_factory=set)
    computed: list[tuple[int, int]] = field(default_factory=list)  # micro-batch, rank
    audited: list[tuple[int, int]] = field(default_factory=list)  # the same
    measured: list[int] = field(default_factory=list)
    updated: list[int] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)


class Team:
    """Fake workers on one board, and the checks that hold at every moment."""

    def __init__(self, setting: Setting, lock: threading.Lock | None = None) -> None:
        self.setting = setting
        self.make_board = setting.maker(lock)
        self.boards = list(map(self.make_board, range(setting.world_size)))
        for rank, board in enumerate(self.boards):
            board.membership.found(100 + rank)
        self.readers = [copy.copy(board) for board in self.boards]  # that see what a worker sees, and never die
        for reader in self.readers:
            reader._words = copy.copy(reader._words)
        self.logs = [StepLog() for _ in range(setting.num_steps)]
        self.living = set(range(setting.world_size))
        self.since = dict.fromkeys(self.living, 0)  # by rank: the first step of the process that is there
        self.redone: list[Action] = []  # what a death has freed
        self.held: dict[int, dict[Node, int]] = {}  # by rank, in the step that it is in

    def newcomer(self, rank: int, pid: int) -> Iterator[Kind]:
        """Wait to be let in, then be a worker; ends if nobody is there any more."""
        board = self.boards[rank]
        board._words.presence[rank * PRESENCE_WORDS + READY] = pid
        while board.presence.pid(rank) != pid:
            yield Kind.WAIT
            if not self.living - {rank} or board.committed == self.setting.num_steps:
                return
        self.living.add(rank)
        self.since[rank] = board.membership.handover
        yield from self.worker(rank)

    def let_in(self, rank: int, step: int) -> None:
        """Let newcomers in before a step, if that falls to this worker."""
        board = self.boards[rank]
        if rank == board.roster.main and board.membership.newcomers(step):
            for local in board.membership.admit(step, 0, step):
                self.living.add(local)
                self.since[local] = step

    def worker(self, rank: int) -> Iterator[Kind]:
        """Go through all steps as an engine does; yields what it is about to do, before it does it."""
        board = self.boards[rank]
        for step in range(self.since[rank], self.setting.num_steps):
            log, count = self.logs[step], self.count(step)
            self.let_in(rank, step)
            log.entered.add(rank)
            held = self.held[rank] = {}
            action = board.enter(step, count, 77, measure=self.setting.clip, audit=self.setting.audits(step))
            while action.kind is not Kind.COMMITTED:
                yield action.kind
                if action.kind is Kind.WAIT:
                    action = board.visit(step)
                elif action.kind is Kind.AUDIT:
                    self.audit(rank, step)
                    action = board.finished_phase(step, Kind.AUDIT)
                elif action.kind is Kind.COMPUTE:
                    action = self.compute(rank, step, action.item, held)
                else:
                    action = self.update(rank, step, action)
            log.committed.add(rank)
            assert board.committed == step + 1
            assert board.ledger.records(step, count) == [(step + index / 8, 1.0 + index) for index in range(count)]
            assert [board.ledger.metrics(step, index) for index in range(count)] == [
                {"m": [index, 2]} for index in range(count)
            ]
            # Between two steps the user's code may read weights, for as long as it likes.
            yield Kind.COMMITTED

    def count(self, step: int) -> int:
        """Return the micro-batches of a step: the last one is a short global batch."""
        last = step == self.setting.num_steps - 1
        return max(1, self.setting.num_micro_batches - 2) if last else self.setting.num_micro_batches

    def compute(self, rank: int, step: int, index: int, held: dict[Node, int]) -> Action:
        board, count, log = self.boards[rank], self.count(step), self.logs[step]
        assert board._words.claimant(Kind.COMPUTE, index, step) == rank
        assert not log.updated, "no update begins before every micro-batch is done"
        chain, node = fold(index, count, held)
        used = set(held.values())
        free = [slot for slot in range(self.setting.size().num_slots) if slot not in used]
        assert free, "the number of held sums never exceeds the room for them"
        freed = [held.pop(sibling) for sibling in chain]
        held[node] = free[0]
        log.computed.append((index, rank))
        board.ledger.touched(index)[:] = bytes([1, index % 2])
        if board.proofs.is_wanted(step) and not chain:
            board.proofs.give(step, Proof(index, 1, 2, (3, 4)))
        metrics = b'{"m": [%d, 2]}' % index
        return board.finished_micro_batch(
            step,
            index,
            Outcome(loss=step + index / 8, weight=1.0 + index, metrics=metrics),
            freed=freed,
            slot=free[0],
            node=node,
        )

    def audit(self, rank: int, step: int) -> None:
        """Compare what another worker has computed, if there was another."""
        board, log = self.boards[rank], self.logs[step]
        assert not log.updated, "no update begins before the audit is done"
        proof = board.proofs.of(step)
        assert proof is not None
        log.audited.append((proof.micro_batch, rank))
        assert not board.proofs.is_own() or len(board.roster.living) == 1, "another worker compares"

    def update(self, rank: int, step: int, action: Action) -> Action:
        board, count, log = self.boards[rank], self.count(step), self.logs[step]
        assert log.entered >= self.living, "no update begins before all have entered"
        assert sorted({index for index, _ in log.computed}) == list(range(count))
        held = board.partial_sums(step)
        assert sorted(leaf for node in held for leaf in range(*node)) == list(range(count)), "each leaf in one sum"
        sum_of(Node(0, count), held)
        if len(self.living) == len(self.boards):
            assert held == {node: (other, slot) for other, sums in self.held.items() for node, slot in sums.items()}
        assert [bytes(board.ledger.touched(index)) for index in range(count)] == [
            bytes([1, i % 2]) for i in range(count)
        ]
        if action.kind is Kind.MEASURE:
            assert self.setting.clip
            assert not log.updated, "no update begins before every norm is known"
            log.measured.append(action.item)
            return board.finished_bucket(step, action, float(action.item))
        assert bool(log.audited) == self.setting.audits(step)
        if self.setting.clip:
            assert board.ledger.norms_squared() == [float(bucket) for bucket in range(self.setting.num_buckets)]
        log.updated.append(action.item)
        return board.finished_bucket(step, action, None)

    def run(self) -> None:
        """Let all workers run to their end, in an order that seed and speeds decide."""
        chance = random.Random(self.setting.seed)
        running = {rank: self.worker(rank) for rank in range(self.setting.world_size)}
        speeds = self.setting.speeds or (1,) * self.setting.world_size
        turns = 0
        while running:
            ranks = list(running)
            rank = chance.choices(ranks, [speeds[rank] for rank in ranks])[0]
            if next(running[rank], None) is None:
                del running[rank]
            turns += 1
            assert turns < 1_000_000, "nobody can go on"

    def check(self) -> None:
        """Check what must have happened once all is done."""
        setting = self.setting
        for step, log in enumerate(self.logs):
            done = (
                (Kind.COMPUTE, [index for index, _ in log.computed], range(self.count(step))),
                (Kind.UPDATE, log.updated, range(setting.num_buckets + 1)),  # the buffers are the last one
                (Kind.MEASURE, log.measured, range(setting.num_buckets if setting.clip else 0)),
            )
            for kind, items, expected in done:
                once = items.copy()
                for action in self.redone:
                    if action.kind is kind and once.count(action.item) > 1:
                        once.remove(action.item)
                assert sorted(once) == list(expected), f"{kind.name} of every piece once"
            assert log.committed >= {rank for rank in self.living if self.since[rank] <= step}

    def die(self, dead: int) -> None:
        """A worker is no more: take note of what it had in hand."""
        reader = self.readers[dead]
        step = reader.committed
        self.living.remove(dead)
        if step < self.setting.num_steps:
            count, seat = self.count(step), reader._seat
            phases = phases_of(seat, Shape(count, self.setting.clip, self.setting.audits(step)))
            done = [index for index in range(count) if reader._words.done[Kind.COMPUTE][index] == step + 1]
            sums = partial_sums(reader._words, seat, step, count)
            assert sorted(leaf for node in sums for leaf in range(*node)) == done, "what is done is in one sum"
            redone = freed_by_death(reader._words, dead, step, phases)
            assert len(redone) <= 1, "a worker has one piece of work in hand"
            self.redone += redone


class Killed(Exception):
    """Raised in place of a write."""


@dataclass
class Life:
    """How many words a worker still writes before it dies; counts them where there is no end to it."""

    left: int = 1_000_000_000

    def write(self) -> None:
        if not self.left:
            raise Killed
        self.left -= 1


class Mortal:
    """A board's words as one worker sees them, that dies between two writes."""

    def __init__(self, words: memoryview, life: Life) -> None:
        self._words, self._life = words, life

    def __getitem__(self, key: Any) -> Any:
        value = self._words[key]
        return Mortal(value, self._life) if isinstance(key, slice) else value

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, slice):
            self._life.write()
            self._words[key] = value
            return
        part = self._words[key]
        at_once = max(1, 8 // part.itemsize)
        for start in range(0, len(part), at_once):
            self._life.write()
            part[start : start + at_once] = value[start : start + at_once]

    def __bytes__(self) -> bytes:
        return bytes(self._words)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._words)

    def tolist(self) -> list[Any]:
        return self._words.tolist()


def with_a_life(board: Board) -> Life:
    """Let a worker's board die between two words; return its life."""
    life = Life()
    words: dict[str, Any] = board._words.__dict__
    for name, value in words.items():
        if isinstance(value, memoryview):
            words[name] = Mortal(value, life)
        elif isinstance(value, tuple):
            words[name] = tuple(Mortal(array, life) for array in value)
    return life


def run_until_stuck(running: dict[int, Iterator[Kind]], order: random.Random) -> None:
    """Let workers run until all have ended, or everyone waits however often it looks again."""
    waits = 0
    while running and waits < 3 * len(running):
        for rank in order.sample(list(running), len(running)):
            kind = next(running[rank], None)
            if kind is None:
                del running[rank]
            waits = waits + 1 if kind is Kind.WAIT else 0


SHORT_LIVES = [
    Setting(world_size=2, num_micro_batches=5, num_buckets=2, num_steps=2, clip=True),
    Setting(world_size=3, num_micro_batches=8, num_buckets=1, num_steps=2, seed=1),
    Setting(world_size=2, num_micro_batches=8, num_buckets=0, num_steps=2, steal=False, seed=2),
]


@pytest.mark.parametrize("setting", SHORT_LIVES, ids=range(3))
def test_a_worker_may_die_after_any_word_that_it_writes(setting: Setting) -> None:
    """Those who live go on or wait, and see sums of whole micro-batches alone; without it, they do what is left."""

    def live(num_words: int | None) -> int:
        team = Team(setting)
        life = with_a_life(team.boards[1])
        begun = life.left = life.left if num_words is None else num_words
        running = {rank: team.worker(rank) for rank in range(setting.world_size)}
        order = random.Random(setting.seed)
        dead = False
        while running and not dead:
            for rank in order.sample(list(running), len(running)):
                try:
                    if next(running[rank], None) is None:
                        del running[rank]
                except Killed:
                    dead = True
                    del running[rank]
                    break
        if dead:
            team.die(1)
            run_until_stuck(running, order)
            team.boards[min(team.living)].membership.bury(1, 101)
            run_until_stuck(running, order)
            assert not running, "nobody can go on"
        team.check()
        return begun - life.left

    num_words = live(None)
    assert num_words > 30
    for count in range(num_words):
        live(count)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_from_the_last_place_on_is_what_is_found_from_the_beginning(seed: int) -> None:
    setting = Setting(world_size=3, num_micro_batches=8, num_buckets=4, clip=seed % 2 == 0, seed=seed)
    team = Team(setting)
    for board in team.boards:
        remember = board._next

        def forgetful(step: int, *, wrote: bool, board: Board = board, visit: Any = remember) -> Action:
            board._at = board._position = 0
            action: Action = visit(step, wrote=wrote)
            return action

        board.__dict__["_next"] = forgetful
    team.run()
    team.check()


def test_a_slot_that_is_being_freed_is_read_as_full_or_as_empty() -> None:
    a, b = Setting(world_size=2, num_micro_batches=8, steal=False).boards()
    a.enter(0, 8, 1, measure=False)
    b.enter(0, 8, 1, measure=False)
    for index in range(4, 8):
        node = Node(4, 8) if index == 7 else Node(index, index + 1)
        b.finished_micro_batch(0, index, Outcome(loss=0.0, weight=1.0), freed=[], slot=index - 4, node=node)
    b._words.done[Kind.COMPUTE][7] = 0  # as it was before the last word of that visit but one
    assert set(a.partial_sums(0)) == {Node(4, 5), Node(5, 6), Node(6, 7)}
    b._words.done[Kind.COMPUTE][7] = 1
    assert set(a.partial_sums(0)) == {Node(4, 8)}, "what went into another sum does not count beside it"


def test_after_a_resume_to_an_earlier_step_nothing_of_the_later_ones_counts() -> None:
    team = Team(Setting(world_size=2, num_micro_batches=4))
    team.run()
    a, b = team.boards
    a.resume_at(1)
    assert a.enter(1, 4, 1, measure=False).kind is Kind.COMPUTE
    for index in range(4):
        action = finish(a, 1, index)
    assert action.kind is Kind.WAIT, "the other one has not entered step 1 again: it may be reading weights"
    assert b.enter(1, 4, 1, measure=False).kind is Kind.UPDATE


team_sizes = st.integers(1, 7)


@given(
    st.builds(
        Setting,
        world_size=team_sizes,
        num_micro_batches=st.integers(1, 24),
        num_buckets=st.integers(0, 5),
        clip=st.booleans(),
        steal=st.booleans(),
        speeds=st.tuples(*[st.sampled_from([1, 1, 10, 1000])] * 7),
        seed=st.integers(0, 2**32),
    )
)
@settings(max_examples=80, deadline=None)
def test_whole_steps_at_any_speeds_do_each_piece_of_work_once_and_in_order(setting: Setting) -> None:
    team = Team(setting)
    team.run()
    team.check()


@given(st.integers(2, 6), st.integers(2, 24), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_without_stealing_everyone_computes_its_own_share(world_size: int, count: int, seed: int) -> None:
    team = Team(Setting(world_size=world_size, num_micro_batches=count, steal=False, num_steps=1, seed=seed))
    team.run()
    count = team.count(0)
    for index, rank in team.logs[0].computed:
        assert rank * count // world_size <= index < (rank + 1) * count // world_size


def test_a_late_worker_is_relieved_of_what_it_has_not_started() -> None:
    team = Team(Setting(world_size=2, num_micro_batches=8, num_steps=2, speeds=(1, 10_000), seed=1))
    team.run()
    team.check()
    for_the_late = [index for index, rank in team.logs[0].computed if rank == 0]
    assert len(for_the_late) <= 1


@pytest.mark.parametrize("clip", [False, True])
def test_threads_that_race_do_each_piece_of_work_once(clip: bool) -> None:
    setting = Setting(world_size=4, num_micro_batches=16, num_buckets=6, num_steps=40, clip=clip)
    team = Team(setting)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for _ in team.worker(rank):
                pass
        except BaseException as error:
            errors.append(error)
            team.boards[rank].presence.fail()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(setting.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    team.check()


def test_different_settings_are_named_before_any_update() -> None:
    a, b = Setting(world_size=2, num_micro_batches=2, steal=False).boards()
    assert a.enter(0, 2, 1, measure=False) == Action(Kind.COMPUTE, 0)
    finish(a, 0, 0)
    assert b.enter(0, 2, 2, measure=False) == Action(Kind.COMPUTE, 1)
    with pytest.raises(Disagreement, match=r"at step 0 rank 1 has other learning rates.* than rank 0"):
        finish(b, 0, 1)


def finish(board: Board, step: int, index: int, metrics: bytes = b"") -> Action:
    return board.finished_micro_batch(
        step, index, Outcome(loss=1.0, weight=1.0, metrics=metrics), freed=[], slot=0, node=Node(index, index + 1)
    )


def test_different_numbers_of_micro_batches_are_named() -> None:
    a, b = Setting(world_size=2, num_micro_batches=4).boards()
    a.enter(0, 4, 1, measure=False)
    with pytest.raises(Disagreement, match="step 0 has 3 micro-batches for rank 1 and 4 for another worker"):
        b.enter(0, 3, 1, measure=False)


def test_a_worker_that_failed_stops_the_others_and_is_described() -> None:
    a, b = Setting(world_size=2, num_micro_batches=4).boards()
    b.membership.found(4711)
    assert b.enter(0, 4, 1, measure=False).kind is Kind.COMPUTE
    assert a.presence.describe_worker(1) == "rank 1 (pid 4711) computes micro-batch 2 of step 0"
    b.presence.fail()
    assert b.presence.failure() is None
    assert isinstance(a.presence.failure(), RankFailed)
    for call in (lambda: a.enter(0, 4, 1, measure=False), lambda: a.take_evaluation(1), lambda: a.visit(0)):
        with pytest.raises(
            RankFailed, match=r"rank 0 ends because rank 1 \(pid 4711\) computes micro-batch 2 of step 0"
        ):
            call()


def test_a_worker_that_left_its_loop_is_not_waited_for_once_it_meets_or_ends() -> None:
    for excuse in (Activity.MEETING, Activity.ENDED):
        a, b = Setting(world_size=2, num_micro_batches=1, num_buckets=1).boards()
        b.presence.set_left(left=True)
        assert a.presence.anyone_left()
        assert a.enter(0, 1, 1, measure=False) == Action(Kind.COMPUTE, 0)
        assert finish(a, 0, 0).kind is Kind.WAIT, "it may still read weights in code after the loop"
        b.presence.announce(excuse)
        action = a.visit(0)
        while action.kind is not Kind.COMMITTED:
            assert action.kind is Kind.UPDATE
            action = a.finished_bucket(0, action, None)


def test_batches_of_an_evaluation_are_each_given_once_and_a_new_one_begins_anew() -> None:
    boards = Setting(world_size=3, num_micro_batches=1).boards()
    assert [board.take_evaluation(1) for board in boards * 2] == list(range(6))
    assert [board.take_evaluation(2) for board in boards] == [0, 1, 2]


def test_metrics_that_do_not_fit_are_refused() -> None:
    (board,) = Setting(world_size=1, num_micro_batches=2).boards()
    board.enter(0, 2, 1, measure=False)
    with pytest.raises(UsageError, match=f"take {METRICS_BYTES} bytes, more than {METRICS_BYTES - 8}"):
        finish(board, 0, 0, metrics=b" " * METRICS_BYTES)


def test_every_activity_has_words() -> None:
    (board,) = Setting(world_size=1, num_micro_batches=2).boards()
    words = set()
    for activity in Activity:
        board.presence.show(activity, 3)
        assert board.presence.activity(0) is activity
        words.add(board.presence.describe_worker(0))
    assert len(words) == len(Activity)


def test_a_resumed_board_goes_on_at_its_step() -> None:
    team = Team(Setting(world_size=2, num_micro_batches=4, num_steps=1))
    for board in team.boards:
        board.resume_at(7)
    assert team.boards[1].committed == 7
    assert team.boards[0].enter(7, 4, 1, measure=False).kind is Kind.COMPUTE


def random_setting(chance: random.Random) -> Setting:
    world_size = chance.randint(2, 5)
    return Setting(
        world_size=world_size,
        num_micro_batches=chance.randint(3, 24),
        num_buckets=chance.randint(0, 3),
        num_steps=chance.randint(1, 4),
        clip=chance.random() < 0.5,
        audit_every=chance.choice((0, 1, 2)),
        steal=chance.random() < 0.7,
        speeds=tuple(chance.choice((1, 5, 30)) for _ in range(world_size)),
    )


def schedule(seed: int) -> tuple[int, int]:
    """Let a team run to its end while workers die at any word and others come; return the deaths, and who was let in.

    Also who buries others dies, who lets them in, and who comes; one worker always lives.
    """
    chance = random.Random(seed)
    setting = random_setting(chance)
    team = Team(setting)
    ranks = range(setting.world_size)
    lives = {rank: with_a_life(team.boards[rank]) for rank in ranks}
    (immortal,) = chance.sample(list(ranks), 1)
    for rank in chance.sample(list(ranks), chance.randint(1, setting.world_size - 1)):
        if rank != immortal:
            lives[rank].left = chance.randint(0, 60 * setting.num_steps)
    running = {rank: team.worker(rank) for rank in ranks}
    pids = {rank: 100 + rank for rank in ranks}
    unburied: dict[int, set[tuple[int, int]]] = {rank: set() for rank in ranks}  # that a worker could find dead
    turns = deaths = 0
    while running:
        order = list(running)
        rank = chance.choices(order, [setting.speeds[rank] for rank in order])[0]
        try:
            kind = next(running[rank], None)
            if kind is None:
                del running[rank]
            elif kind is Kind.WAIT and chance.random() < 0.3:
                for dead in sorted(unburied[rank]):
                    team.boards[rank].membership.bury(*dead)
                    unburied[rank].discard(dead)
        except Killed:
            deaths += 1
            del running[rank]
            if team.boards[rank].presence.pid(rank) == pids[rank]:  # else it was not in yet
                team.die(rank)
            for other in team.living:
                unburied[other].add((rank, pids[rank]))
            if deaths < 12 and chance.random() < 0.7:
                pids[rank] += 1000
                unburied[rank] = set()
                team.boards[rank] = team.make_board(rank)
                team.readers[rank] = copy.copy(team.boards[rank])
                team.readers[rank]._words = copy.copy(team.readers[rank]._words)
                life = with_a_life(team.boards[rank])
                if chance.random() < 0.7:
                    life.left = chance.randint(0, 60 * setting.num_steps)
                running[rank] = team.newcomer(rank, pids[rank])
        turns += 1
        assert turns < MAX_TURNS, "nobody can go on"
    team.check()
    return deaths, sum(since > 0 for since in team.since.values())


def test_any_may_die_at_any_word_while_others_bury_them_and_come() -> None:
    deaths, came = map(sum, zip(*map(schedule, range(NUM_SCHEDULES)), strict=True))
    assert deaths > NUM_SCHEDULES / 2
    assert came > NUM_SCHEDULES / 8


# --- boards that are wrong, each in one place: schedules find it ------------------------------------------------------


def frees_nothing(*_: Any) -> list[Action]:
    return []


def follow_without_looking_back(self: Board, step: int) -> None:
    position = self._position
    follow(self, step)
    self._position = position


def finish_done_first(
    self: Board, step: int, index: int, outcome: Outcome, *, freed: Sequence[int], slot: int, node: Node
) -> Action:
    self.ledger.write_outcome(step, index, outcome)
    slots = self._words.slots_of(self._local_rank)
    with self._lock:
        self._words.done[Kind.COMPUTE][index] = step + 1
        slots[slot] = slot_word(node)
        for old in freed:
            slots[old] = 0
        return self._next(step, wrote=True)


def finish_freed_first(
    self: Board, step: int, index: int, outcome: Outcome, *, freed: Sequence[int], slot: int, node: Node
) -> Action:
    self.ledger.write_outcome(step, index, outcome)
    slots = self._words.slots_of(self._local_rank)
    with self._lock:
        for old in freed:
            slots[old] = 0
        slots[slot] = slot_word(node)
        self._words.done[Kind.COMPUTE][index] = step + 1
        return self._next(step, wrote=True)


def finish_without_an_outcome(self: Ledger, step: int, index: int, outcome: Outcome) -> None:
    """Write it after the micro-batch is done: not at all, for a worker that dies then."""
    if index % 2:
        write_outcome(self, step, index, outcome)


def bury_whoever_is_there(self: Membership, local_rank: int, pid: int) -> None:
    with self._lock:
        self._bury(local_rank)


def let_in_too_soon(self: Membership, step: int) -> list[int]:
    return [local for local in self._first.locals if self._words.newcomer(local)]


follow, write_outcome = Board._follow, Ledger.write_outcome

MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "what the dead had in hand stays theirs": (memberships, "freed_by_death", frees_nothing),
    "nobody looks back for what is free again": (Board, "_follow", follow_without_looking_back),
    "a micro-batch is done before its sum is": (Board, "finished_micro_batch", finish_done_first),
    "sums are free before the new one counts": (Board, "finished_micro_batch", finish_freed_first),
    "who has come is buried for who was there": (Membership, "bury", bury_whoever_is_there),
    "a place is given away while it is needed": (Membership, "newcomers", let_in_too_soon),
    "an outcome is not written": (Ledger, "write_outcome", finish_without_an_outcome),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_schedules_find_a_board_that_is_wrong_in_one_place(
    mutation: tuple[Any, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*mutation)
    monkeypatch.setattr(f"{__name__}.MAX_TURNS", 20_000)
    with pytest.raises((AssertionError, KeyError)):
        list(map(schedule, range(600)))
