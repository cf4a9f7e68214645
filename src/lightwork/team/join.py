"""Joining a team: from environment variables to shared memory that all workers have open.

The order: the leader of each host makes its memory and publishes where it is, with a fingerprint of its script; the
others of the host compare theirs and open it; the leaders connect to each other; and all meet at the first exchange.
From then on the board tells who does what.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lightwork.device.base import Device
from lightwork.errors import Disagreement, RankLost, TeamError
from lightwork.spec.footprint import expected_bytes, regions_of
from lightwork.spec.holdings import Holdings, Home
from lightwork.spec.hosts import Hosts
from lightwork.spec.plan import Plan
from lightwork.store.elements import Units
from lightwork.store.mapped import MappedStore, check_room, create_disk_store, create_store, open_store
from lightwork.store.regions import Regions, map_regions
from lightwork.team.board import Activity, Board, BoardSize
from lightwork.team.environment import Environment, Launcher
from lightwork.team.peers import Peers
from lightwork.team.rendezvous import JOIN_TIMEOUT, Rendezvous
from lightwork.transport import nccl
from lightwork.transport.base import Carrier, PointToPoint, Transport
from lightwork.transport.gloo import PATIENCE, GlooCarrier
from lightwork.transport.layered import LayeredTransport
from lightwork.transport.lock import FileLock
from lightwork.transport.mailboxes import HostTransport
from lightwork.transport.relay import Relay
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
    memory: Regions
    signal: Signal
    lock: AbstractContextManager[bool | None]
    board: Board
    mailboxes: HostTransport  #: of the workers of this host
    transport: Transport  #: of all workers
    carrier: Carrier | None  #: the leader's, where there are several hosts
    weights_carrier: Carrier | None  #: ... and weights are sharded
    hosts: Hosts
    host: int
    peers: Peers
    hostname: str

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.environment.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.environment.world_size

    @property
    def local_rank(self) -> int:
        """This worker's number on its host."""
        return self.rank - self.hosts.first_rank(self.host)

    @property
    def is_leader(self) -> bool:
        """Whether this worker speaks for its host."""
        return self.local_rank == 0

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
            missing = [local for local in range(self.hosts.sizes[self.host]) if not self.board.pid(local)]
            if missing and time.monotonic() > deadline:
                raise RankLost(
                    f"rank {self._name(missing[0])} has not called lightwork.distribute, {JOIN_TIMEOUT:.0f} s after "
                    f"rank {self.rank}. Every worker must reach it; see the log of that worker."
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
        for local in self.peers.ended():
            if not self.board.has_left(local):
                raise RankLost(
                    f"rank {self._name(local)} (pid {self.board.pid(local)}) is gone; rank {self.rank} needs it in "
                    f"step {step}. Its process ended in the middle of training; see its log."
                )
        for local in self._others():
            # Only in an exchange that this worker has not entered: otherwise it is just slow to wake from one.
            calls_alone = self.board.activity(local) is Activity.MEETING and self.mailboxes.is_ahead(local)
            entered = self.board.entered(local)
            if calls_alone and entered < step and not self.board.has_left(local):
                raise Disagreement(
                    f"rank {self._name(local)} calls {self.mailboxes.posted_last(local)} after step {entered} while "
                    f"rank {self.rank} is in step {step}. {_SAME_CALLS}"
                )

    def _check_meeting(self) -> None:
        missing = [local for local in self._others() if self.mailboxes.posted(local) is None]
        for local in self.peers.ended():
            if local in missing:
                raise RankLost(
                    f"rank {self._name(local)} (pid {self.board.pid(local)}) has ended while rank {self.rank} "
                    f"waits for it in a collective call. {_SAME_CALLS}"
                )
        for local in missing:
            # Only in a step that is still open: otherwise it is just slow to wake from its end.
            if self.board.waits_in_open_step(local) and not self.board.has_left(self.local_rank):
                raise Disagreement(
                    f"rank {self.rank} is in a collective call (save, digest, evaluate, ...) while "
                    f"{self.board.describe(local)}. {_SAME_CALLS}"
                )

    def _others(self) -> list[int]:
        """Return the numbers on this host of its other workers."""
        return [local for local in range(self.hosts.sizes[self.host]) if local != self.local_rank]

    def _name(self, local: int) -> int:
        """Return the rank of a worker of this host."""
        return self.hosts.first_rank(self.host) + local


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
                board.describe(local)
                for local in self._team._others()
                if board.activity(local) not in (Activity.WAITING, Activity.MEETING)
            ]
            if busy:
                notice(f"rank {self._team.rank} waits {self._where} for: {'; '.join(busy)}.")


def notice(text: str) -> None:
    """Tell the user something that is not an error."""
    print(f"lightwork: {text}", file=sys.stderr, flush=True)


def find_hosts(
    environment: Environment, plan: Plan, rendezvous: Rendezvous, run_number: int, *, has_own_memory: bool = False
) -> tuple[Hosts, int]:
    """Return which workers share a memory, and the host of this one.

    With transport "group", or on devices, which have memories of their own, each worker by itself.
    """
    world_size = environment.world_size
    if plan.transport == "group" or has_own_memory:
        return Hosts((1,) * world_size), environment.rank
    if environment.launcher in (Launcher.PYTHON, Launcher.LIGHTWORK):
        return Hosts((world_size,)), 0
    rendezvous.publish(f"host of {environment.rank} in run {run_number}", environment.machine)
    machines = [rendezvous.wait(f"host of {rank} in run {run_number}") for rank in range(world_size)]
    hosts = Hosts(tuple(len(list(ranks)) for _, ranks in itertools.groupby(machines)))
    if len(hosts) != len(set(machines)):
        raise TeamError(
            f"the ranks of a machine are not neighbours ({', '.join(machines)}). Let the launcher fill one machine "
            "after the other (srun --distribution=block, mpirun --map-by slot)."
        )
    return hosts, hosts.host_of(environment.rank)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of its team's memory."""

    holdings: Holdings
    device: Device
    flags: Mapping[str, int]  #: bytes of the regions of flags and numbers
    buffers: Mapping[str, int]  #: bytes of the regions of the model's buffers


def join(needs: Needs, plan: Plan, environment: Environment, rendezvous: Rendezvous, run_number: int) -> Team:
    """Return this worker's team, once every worker has come.

    Raises: MemoryFull, Disagreement, TeamError.
    """
    holdings, device = needs.holdings, needs.device
    hosts, host = holdings.hosts, holdings.host
    local_rank = environment.rank - hosts.first_rank(host)
    size = BoardSize(
        world_size=holdings.num_workers,
        num_micro_batches=holdings.spec.num_micro_batches,
        num_parameters=len(holdings.layout.parameters),
        num_buckets=len(holdings.layout.buckets),
        num_hosts=len(hosts),
    )
    fixed = {
        "signal": _SIGNAL_BYTES,
        "mailboxes": HostTransport.num_bytes(hosts.sizes[host]),
        "board": Board.num_bytes(size),
        **needs.flags,
    }
    memory_map = map_regions(regions_of(holdings, fixed, needs.buffers))
    fingerprint = _fingerprint(holdings, device)
    key = f"memory {run_number} of {hosts.first_rank(host)}"
    if local_rank == 0:
        _check_room(holdings, plan)
        store, disk = create_store(plan.shared_memory, memory_map.num_bytes), None
        if memory_map.disk_bytes:
            disk = create_disk_store(Path(plan.offload_dir or tempfile.gettempdir()), memory_map.disk_bytes)
        if hosts.sizes[host] > 1:
            addresses = {"address": store.address(), "disk": disk.address() if disk else None}
            rendezvous.publish(key, json.dumps({**addresses, "fingerprint": fingerprint}))
    else:
        published = json.loads(rendezvous.wait(key))
        _compare("lightwork.distribute", published["fingerprint"], fingerprint, environment.rank)
        store = open_store(published["address"])
        disk = open_store(published["disk"]) if published["disk"] else None
    carrier: Carrier | None = None
    weights_carrier: Carrier | None = None
    if local_rank == 0 and len(hosts) > 1:
        leaders = [hosts.first_rank(other) for other in range(len(hosts))]
        address = rendezvous.address()

        def late(rank: int, seconds: float) -> None:
            notice(f"rank {environment.rank} has been waiting for rank {rank} for {seconds:.0f} s.")

        carrier = GlooCarrier(rendezvous.store(f"leaders {run_number}"), host, leaders, address, late=late)
        if holdings.shares_weights:
            weights_carrier = GlooCarrier(rendezvous.store(f"weights {run_number}"), host, leaders, address, PATIENCE)
        if device.has_own_memory:
            carrier = Relay(device, carrier, _direct(carrier, device, environment, rendezvous, run_number))
            weights_carrier = Relay(device, weights_carrier) if weights_carrier is not None else None
    units = Units(holdings.layout) if device.has_own_memory else None
    memory = Regions(store.buffer, memory_map, device, disk=disk.fileno() if disk else None, units=units)
    signal = Signal(store.buffer, memory.offset("signal"))
    fd = store.fileno()
    lock: AbstractContextManager[bool | None] = FileLock(fd) if fd is not None else threading.Lock()
    region = memory.region("board")
    board = Board(
        local_rank,
        size,
        region,
        lock,
        signal,
        steal=plan.steal,
        hosts=hosts,
        host=host,
        sharded=holdings.shares_state,
    )
    board.join(os.getpid())
    mailboxes = HostTransport(local_rank, hosts.sizes[host], memory.region("mailboxes"), lock, signal)
    team = Team(
        environment=environment,
        rendezvous=rendezvous,
        store=store,
        memory=memory,
        signal=signal,
        lock=lock,
        board=board,
        mailboxes=mailboxes,
        transport=mailboxes if len(hosts) == 1 else LayeredTransport(mailboxes, hosts, host, carrier),
        carrier=carrier,
        weights_carrier=weights_carrier,
        hosts=hosts,
        host=host,
        peers=Peers(),
        hostname=socket.gethostname(),
    )
    team.meet_first()
    store.published()
    if disk:
        disk.published()
    for other in range(hosts.sizes[host]):
        if other != local_rank:
            team.peers.watch(other, board.pid(other))
    if len(hosts) > 1:
        team.meet_equal("lightwork.distribute", fingerprint)
    return team


def _direct(
    carrier: Carrier, device: Device, environment: Environment, rendezvous: Rendezvous, run_number: int
) -> PointToPoint | None:
    """Return the way between GPUs; None where there is none, or two workers share one."""
    if device.place.type != "cuda":
        return None
    own = f"{environment.machine} {device.place}"
    seen = carrier.exchange("devices", own.encode())
    if len(set(seen)) < len(seen):
        return None
    return nccl.connect(rendezvous.store(f"devices {run_number}"), carrier.host, carrier.num_hosts, device.place)


def _fingerprint(holdings: Holdings, device: Device) -> dict[str, object]:
    """Return what must be the same for the workers' bits, and their memory, to fit together."""
    names = hashlib.sha256("\n".join(p.name for p in holdings.layout.parameters).encode()).hexdigest()
    place = device.place
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "precision of fp32 products": torch.get_float32_matmul_precision(),
        "spec": json.loads(holdings.spec.to_json()),
        "parameters": holdings.layout.fingerprint(),
        "names of parameters": names,
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


def _check_room(holdings: Holdings, plan: Plan) -> None:
    needed = expected_bytes(holdings, (Home.HOST if holdings.has_device else Home.HERE,))
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
