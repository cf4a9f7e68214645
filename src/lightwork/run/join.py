"""Joining a team: from environment variables to shared memory that all workers have open.

The order: rank 0 makes the memory and publishes where it is, with a fingerprint of its script; the others compare
theirs, open it, and all meet at the first exchange. From then on the board tells who does what.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import psutil
import torch

from lightwork.engine.engine import Blueprint
from lightwork.engine.memory import MemoryMap, SharedMemory
from lightwork.errors import Disagreement, RankLost
from lightwork.spec.plan import Plan
from lightwork.store.mapped import MappedStore, check_room, create_store, open_store
from lightwork.team.board import Activity, Board
from lightwork.team.environment import Environment
from lightwork.team.peers import Peers
from lightwork.team.rendezvous import JOIN_TIMEOUT, Rendezvous
from lightwork.transport.host import HostTransport
from lightwork.transport.lock import FileLock
from lightwork.transport.signal import Signal
from lightwork.units import format_bytes

#: Bytes at the start of the memory for the signal's number, a cache line of its own.
_SIGNAL_BYTES = 64

_SAME_CALLS = "Every worker must make the same calls: take them out of conditions such as `if run.is_main`."

#: Seconds after which a waiting worker says whom it waits for.
NAME_AFTER_SECONDS = 10.0


@dataclass
class Team:
    """What a worker holds of its team."""

    environment: Environment
    rendezvous: Rendezvous
    store: MappedStore
    memory: SharedMemory
    signal: Signal
    lock: AbstractContextManager[bool | None]
    board: Board
    transport: HostTransport
    peers: Peers
    host: str

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.environment.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.environment.world_size

    def meet(self, what: str, payload: bytes = b"") -> list[bytes]:
        """Exchange payloads with every worker; a barrier. `what` names the collective call.

        Raises: Disagreement, RankLost or RankFailed when not all will come.
        """
        self.board.announce(Activity.MEETING)
        received = self.transport.exchange(what, payload, _Watch(self, f"in {what}", self._check_meeting))
        self.board.show(Activity.OUTSIDE)
        return received

    def meet_first(self) -> None:
        """Meet for the first time, when a worker that will never come can not be watched yet.

        Raises: RankLost when one has not come after `JOIN_TIMEOUT` seconds.
        """
        deadline = time.monotonic() + JOIN_TIMEOUT

        def check() -> None:
            missing = [rank for rank in range(self.world_size) if not self.board.pid(rank)]
            if missing and time.monotonic() > deadline:
                raise RankLost(
                    f"rank {missing[0]} has not called lightwork.distribute, {JOIN_TIMEOUT:.0f} s after rank "
                    f"{self.rank}. Every worker must reach it; see the log of that worker."
                )

        self.board.announce(Activity.MEETING)
        self.transport.exchange("distribute", b"", check)

    def meet_equal(self, what: str, values: dict[str, object]) -> None:
        """Meet, and raise Disagreement naming the first value in which a worker differs from rank 0."""
        received = [json.loads(payload) for payload in self.meet(what, json.dumps(values).encode())]
        for rank, theirs in enumerate(received):
            _compare(what, received[0], theirs, rank)

    def watch_step(self, step: int) -> _Watch:
        """Return what to call while waiting in `step`."""
        return _Watch(self, f"in step {step}", lambda: self._check_step(step))

    def _check_step(self, step: int) -> None:
        for rank in self.peers.ended():
            if not self.board.has_left(rank):
                raise RankLost(
                    f"rank {rank} (pid {self.board.pid(rank)}) is gone; rank {self.rank} needs it in step {step}. Its "
                    "process ended in the middle of training; see its log."
                )
        for rank in self._others():
            # Only in an exchange that this worker has not entered: otherwise it is just slow to wake from one.
            calls_alone = self.board.activity(rank) is Activity.MEETING and self.transport.is_ahead(rank)
            if calls_alone and self.board.entered(rank) < step and not self.board.has_left(rank):
                raise Disagreement(
                    f"rank {rank} calls {self.transport.posted_last(rank)} after step {self.board.entered(rank)} while "
                    f"rank {self.rank} is in step {step}. {_SAME_CALLS}"
                )

    def _check_meeting(self) -> None:
        missing = [rank for rank in self._others() if self.transport.posted(rank) is None]
        for rank in self.peers.ended():
            if rank in missing:
                raise RankLost(
                    f"rank {rank} (pid {self.board.pid(rank)}) has ended while rank {self.rank} waits for it in a "
                    f"collective call. {_SAME_CALLS}"
                )
        for rank in missing:
            # Only in a step that is still open: otherwise it is just slow to wake from its end.
            if self.board.waits_in_open_step(rank) and not self.board.has_left(self.rank):
                raise Disagreement(
                    f"rank {self.rank} is in a collective call (save, digest, evaluate, ...) while "
                    f"{self.board.describe(rank)}. {_SAME_CALLS}"
                )

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]


class _Watch:
    """Looks after the others while this worker waits; names those that it waits for after a while."""

    def __init__(self, team: Team, where: str, check: Callable[[], None]) -> None:
        self._team = team
        self._where = where
        self._check = check
        self._named_at = time.monotonic() + NAME_AFTER_SECONDS

    def __call__(self) -> None:
        self._team.board.raise_if_failed()
        self._check()
        now = time.monotonic()
        if now > self._named_at:
            self._named_at = now + 6 * NAME_AFTER_SECONDS
            board = self._team.board
            busy = [
                board.describe(rank)
                for rank in range(self._team.world_size)
                if rank != self._team.rank and board.activity(rank) not in (Activity.WAITING, Activity.MEETING)
            ]
            if busy:
                notice(f"rank {self._team.rank} waits {self._where} for: {'; '.join(busy)}.")


def notice(text: str) -> None:
    """Tell the user something that is not an error."""
    print(f"lightwork: {text}", file=sys.stderr, flush=True)


def join(blueprint: Blueprint, plan: Plan, environment: Environment, rendezvous: Rendezvous, run_number: int) -> Team:
    """Return this worker's team, once every worker has come.

    Raises: MemoryFull, Disagreement, TeamError.
    """
    rank, world_size = environment.rank, environment.world_size
    memory_map = MemoryMap()
    memory_map.reserve("signal", _SIGNAL_BYTES)
    memory_map.reserve("mailboxes", HostTransport.num_bytes(world_size))
    blueprint.reserve(memory_map)
    fingerprint = _fingerprint(blueprint, memory_map)
    key = f"memory {run_number}"
    if rank == 0:
        _check_room(blueprint, plan)
        store = create_store(plan.shared_memory, memory_map.num_bytes)
        rendezvous.publish(key, json.dumps({"address": store.address(), "fingerprint": fingerprint}))
    else:
        published = json.loads(rendezvous.wait(key))
        _compare("lightwork.distribute", published["fingerprint"], fingerprint, rank)
        store = open_store(published["address"])
    memory = SharedMemory(store.buffer, memory_map)
    signal = Signal(store.buffer, memory_map.offsets["signal"])
    fd = store.fileno()
    lock: AbstractContextManager[bool | None] = FileLock(fd) if fd is not None else threading.Lock()
    board = Board(rank, blueprint.board_size, memory.region("board"), lock, signal, steal=plan.steal)
    board.join(os.getpid())
    transport = HostTransport(rank, world_size, memory.region("mailboxes"), lock, signal)
    team = Team(environment, rendezvous, store, memory, signal, lock, board, transport, Peers(), socket.gethostname())
    team.meet_first()
    store.published()
    for other in range(world_size):
        if other != rank:
            team.peers.watch(other, board.pid(other))
    return team


def _fingerprint(blueprint: Blueprint, memory_map: MemoryMap) -> dict[str, object]:
    """Return what must be the same for the workers' bits, and their memory, to fit together."""
    names = hashlib.sha256("\n".join(p.name for p in blueprint.layout.parameters).encode()).hexdigest()
    return {
        "spec": json.loads(blueprint.spec.to_json()),
        "parameters": blueprint.layout.fingerprint(),
        "names of parameters": names,
        "shared bytes": memory_map.num_bytes,
        "torch": torch.__version__,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def _compare(what: str, ours: dict[str, object], theirs: dict[str, object], rank: int) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise Disagreement(
                f"rank {rank} differs from rank 0 at {what} in its {name}: {_short(theirs.get(name))} "
                f"against {_short(value)}. All "
                "workers must run the same script on the same data with the same settings; nothing "
                "in it may depend on the rank."
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "..."


def _check_room(blueprint: Blueprint, plan: Plan) -> None:
    needed = blueprint.expected_bytes()
    breakdown = ", ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
    check_room(plan.shared_memory, sum(needed.values()), available_memory(), breakdown)


def available_memory() -> int:
    """Return the bytes that the host, or this process's control group, has left."""
    available = int(psutil.virtual_memory().available)
    with (
        contextlib.suppress(OSError, ValueError),
        open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
        open("/sys/fs/cgroup/memory.current", encoding="ascii") as current,
    ):
        available = min(available, int(limit.read()) - int(current.read()))
    return available
