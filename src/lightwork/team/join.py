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
import tempfile
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lightwork.device.base import Device
from lightwork.errors import TeamError
from lightwork.spec.footprint import expected_bytes, regions_of
from lightwork.spec.holdings import Holdings
from lightwork.spec.plan import Plan
from lightwork.spec.roster import FIRST_RANK, Roster, full, with_only
from lightwork.spec.tree import max_partial_sums
from lightwork.store.elements import Units
from lightwork.store.mapped import MappedStore, check_room, create_disk_store, create_store, open_store
from lightwork.store.regions import MemoryMap, Regions, map_regions
from lightwork.team.board import Board
from lightwork.team.environment import Environment, Launcher
from lightwork.team.hosts import Hosts, between_devices, connect_hosts
from lightwork.team.newcomer import Newcomer
from lightwork.team.rendezvous import Rendezvous
from lightwork.team.team import Team, compare
from lightwork.team.words import BoardSize
from lightwork.transport.base import Carrier, Transport
from lightwork.transport.layered import LayeredTransport
from lightwork.transport.lock import FileLock
from lightwork.transport.mailboxes import HostTransport
from lightwork.transport.null import NullCarrier
from lightwork.transport.relay import ByHosts, Relay
from lightwork.transport.signal import Signal
from lightwork.units import format_bytes

#: Places that a team has at least, for workers who may come.
_LEAST_CAPACITY = 8

#: Bytes at the start of the memory for the signal's number, a cache line of its own.
_SIGNAL_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of its team's memory."""

    holdings: Holdings
    device: Device
    flags: Mapping[str, int]  #: bytes of the regions of flags and numbers
    buffers: Mapping[str, int]  #: bytes of the regions of the model's buffers


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A team, and what its workers share."""

    team: Team
    signal: Signal
    memory: Regions
    hosts: Hosts  #: as the leader sees them; another worker sees no others
    weights_carrier: Carrier  #: to the other hosts for weights, where they are sharded


def capacity(num_workers: int) -> int:
    """Return how many workers a team that begins with so many may have."""
    return max(2 * num_workers, os.cpu_count() or 1, _LEAST_CAPACITY)


def find_roster(
    environment: Environment, plan: Plan, rendezvous: Rendezvous, run_number: int, *, has_own_memory: bool = False
) -> Roster:
    """Return who is in the team, and which workers share a memory.

    With transport "group", or on devices, which have memories of their own, each worker by itself.
    """
    world_size = environment.world_size
    if plan.transport == "group" or has_own_memory:
        return Roster.of_sizes((1,) * world_size)
    if environment.launcher in (Launcher.PYTHON, Launcher.LIGHTWORK):
        may_grow = world_size > 1 and plan.elastic and plan.memory is None and plan.offload.get("gradients") != "disk"
        places = range(capacity(world_size) if may_grow else world_size)
        taken = {*range(world_size), environment.rank}  # a newcomer may be one of further ones
        return with_only(Roster.of_sizes((len(places),)), 0, taken, 0)
    rendezvous.publish(f"host of {environment.rank} in run {run_number}", environment.machine)
    machines = [rendezvous.wait_for_message(f"host of {rank} in run {run_number}") for rank in range(world_size)]
    roster = Roster.of_sizes(tuple(len(list(ranks)) for _, ranks in itertools.groupby(machines)))
    if roster.num_hosts != len(set(machines)):
        raise TeamError(
            f"the ranks of a machine are not neighbours ({', '.join(machines)}). Let the launcher fill one machine "
            "after the other (srun --distribution=block, mpirun --map-by slot)."
        )
    return roster


def is_elastic(roster: Roster, launcher: Launcher, device: Device) -> bool:
    """Return whether a team can go on without a worker that is killed: what that held lies in the others' memory.

    Other launchers end the team when a worker ends.
    """
    return launcher is Launcher.LIGHTWORK and roster.num_hosts == 1 < roster.world_size and not device.has_own_memory


def may_lose_hosts(holdings: Holdings, device: Device) -> bool:
    """Return whether a team can go on without a whole host: the others have copies of all that it has.

    (Not yet where tensors travel between devices: NCCL's connections can not be made anew.)
    """
    return holdings.roster.num_hosts > 1 and not holdings.shares_state and not device.has_own_memory


def join(needs: Needs, plan: Plan, environment: Environment, rendezvous: Rendezvous, run_number: int) -> Joined:
    """Return this worker's team, once every worker has come.

    Raises: MemoryFull, Disagreement, TeamError.
    """
    holdings, device, rank = needs.holdings, needs.device, environment.rank
    roster, host = holdings.roster, holdings.host
    size = _board_size(holdings)
    fixed = {
        "signal": _SIGNAL_BYTES,
        "mailboxes": HostTransport.num_bytes(holdings.capacity),
        "board": Board.num_bytes(size),
        **needs.flags,
    }
    memory_map = map_regions(regions_of(holdings, fixed, needs.buffers))
    fingerprint = _fingerprint(holdings, device)
    key = f"memory {run_number} of {roster.leader(host)}"
    if environment.joins:
        store, disk = _open_of_anyone(memory_map, fingerprint, rank, rendezvous, key)
    else:
        store, disk = _make_or_open(holdings, memory_map, fingerprint, plan, rank, rendezvous, key)
    carrier, weights_carrier = _connect(holdings, plan, device, environment, rendezvous, run_number)
    units = Units(holdings.layout) if device.has_own_memory else None
    memory = Regions(store.buffer, memory_map, device, disk=disk.fileno() if disk else None, units=units)
    signal = Signal(store.buffer, memory.offset("signal"))
    fd = store.fileno()
    lock: AbstractContextManager[bool | None] = FileLock(fd) if fd is not None else threading.Lock()
    region, is_sharded = memory.region("board"), holdings.shares_state
    board = Board(rank, roster, size, region, lock, signal, steal=plan.steal, sharded=is_sharded)
    local_rank = roster.local_rank(rank)
    mailboxes = HostTransport(
        local_rank, full(roster).ranks(host), memory.region("mailboxes"), lock, signal, board.membership.is_expected
    )
    hosts = Hosts(carrier, board)
    transport: Transport = mailboxes
    if roster.num_hosts > 1:
        transport = LayeredTransport(mailboxes, host, roster.sizes, hosts.exchange)
    team = Team(rank, roster, board, mailboxes, transport, rendezvous, [store, disk] if disk else [store], hosts)
    if isinstance(lock, FileLock):
        lock.when_held = team.lock_is_held
    if fd is not None:
        rendezvous.show_memory(fd, disk.fileno() if disk else None, holdings.capacity)
    if environment.joins:
        team.newcomer, team.is_in = Newcomer(rank, local_rank, board, mailboxes, signal), False
    else:
        board.membership.found(os.getpid())
        team.meet_first()
    store.published()
    if disk:
        disk.published()
    if roster.num_hosts > 1:
        team.meet_equal("lightwork.distribute", fingerprint)
    return Joined(
        team=team,
        signal=signal,
        memory=memory,
        hosts=hosts,
        weights_carrier=weights_carrier,
    )


def _board_size(holdings: Holdings) -> BoardSize:
    return BoardSize(
        capacity=holdings.capacity,
        num_micro_batches=holdings.spec.num_micro_batches,
        num_parameters=len(holdings.layout.parameters),
        num_buckets=len(holdings.layout.buckets),
        num_hosts=holdings.roster.num_hosts,
        num_spare_slots=holdings.num_slots - max_partial_sums(holdings.spec.num_micro_batches),
    )


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


def _open_of_anyone(
    memory_map: MemoryMap, fingerprint: dict[str, object], rank: int, rendezvous: Rendezvous, key: str
) -> tuple[MappedStore, MappedStore | None]:
    """Return the host's memory and its file on disk, as any worker has them: who made them may have died.

    Raises: Disagreement; TeamError when nobody has them any more.
    """
    published = json.loads(rendezvous.wait_for_message(key))
    compare("lightwork.distribute", published["fingerprint"], fingerprint, rank, FIRST_RANK)
    for path, path_of_disk in rendezvous.memories():
        with contextlib.suppress(TeamError):
            store, disk = open_store(f"{memory_map.num_bytes}:{path}"), None
            if memory_map.disk_bytes:
                disk = open_store(f"{memory_map.disk_bytes}:{path_of_disk}")
            return store, disk
    raise TeamError(f"rank {rank} came too late: no worker of its team is there any more.")


def _make_or_open(
    holdings: Holdings,
    memory_map: MemoryMap,
    fingerprint: dict[str, object],
    plan: Plan,
    rank: int,
    rendezvous: Rendezvous,
    key: str,
) -> tuple[MappedStore, MappedStore | None]:
    """Return the host's memory and its file on disk, if there is one: the leader makes them, the others open them."""
    leader = holdings.roster.leader(holdings.host)
    if rank != leader:
        published = json.loads(rendezvous.wait_for_message(key))
        compare("lightwork.distribute", published["fingerprint"], fingerprint, rank, leader)
        return open_store(published["address"]), open_store(published["disk"]) if published["disk"] else None
    _check_room(holdings, plan)
    store, disk = create_store(plan.shared_memory, memory_map.num_bytes), None
    if memory_map.disk_bytes:
        disk = create_disk_store(Path(plan.offload_dir or tempfile.gettempdir()), memory_map.disk_bytes)
    if len(holdings.roster.ranks(holdings.host)) > 1:
        addresses = {"address": store.address(), "disk": disk.address() if disk else None}
        rendezvous.publish(key, json.dumps({**addresses, "fingerprint": fingerprint}))
    return store, disk


def _connect(
    holdings: Holdings, plan: Plan, device: Device, environment: Environment, rendezvous: Rendezvous, run_number: int
) -> tuple[Carrier, Carrier]:
    """Return carriers to the other hosts, for gradients and for weights: a leader's, as far as there is such a need."""
    rank, roster, host = environment.rank, holdings.roster, holdings.host
    carrier: Carrier = NullCarrier(rank)
    weights_carrier: Carrier = NullCarrier(rank)
    if roster.num_hosts == 1 or not roster.is_leader(rank):
        return carrier, weights_carrier
    leaders = [roster.leader(other) for other in range(roster.num_hosts)]
    carrier = connect_hosts(
        f"leaders {run_number}",
        host,
        leaders,
        environment,
        rendezvous,
        plan.lease,
        may_lose=plan.elastic and may_lose_hosts(holdings, device),
    )
    if holdings.shares_weights:
        weights_carrier = connect_hosts(f"weights {run_number}", host, leaders, environment, rendezvous, plan.lease)
    if device.has_own_memory:
        carrier = Relay(device, carrier, between_devices(carrier, device, environment, rendezvous, run_number))
        weights_carrier = Relay(device, weights_carrier, ByHosts(device, weights_carrier))
    return carrier, weights_carrier


def _check_room(holdings: Holdings, plan: Plan) -> None:
    needed = expected_bytes(holdings, (holdings.memories.on_host,))
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
