"""Connections to the other hosts: who is connected to whom, by which rendezvous, and for what."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch

from lightwork.device.base import Device
from lightwork.errors import HostLost, RankLost
from lightwork.notice import notice
from lightwork.team.board import Board
from lightwork.team.environment import Environment
from lightwork.team.meeting_point import JOIN_TIMEOUT
from lightwork.team.neighbours import Neighbours
from lightwork.team.rendezvous import Rendezvous
from lightwork.transport import nccl
from lightwork.transport.base import GIVEN_TAG, Carrier, Farewell, PointToPoint
from lightwork.transport.doors import Door, Secret, connect_all
from lightwork.transport.layered import packed_list, unpacked_list
from lightwork.transport.regrouping import Regrouping
from lightwork.transport.relay import ByHosts
from lightwork.transport.sockets import SocketCarrier

#: In leases, in which a worker may be stopped whose process others see: for how long a machine may not answer, and a
#: process say nothing, which may be in one long C call.
_SILENCE, _PATIENCE = 5.0, 150.0

#: Seconds, where workers are waited for however long they are stopped.
_NEVER = 86_400.0

T = TypeVar("T")

#: The hosts of whose loss the user was told.
_TOLD: set[int] = set()


def connect_hosts(
    purpose: str,
    host: int,
    leaders: list[int],
    environment: Environment,
    rendezvous: Rendezvous,
    lease: float,
    *,
    may_lose: bool = False,
) -> Carrier:
    """Return connections to all other hosts, whose leaders call this, too.

    The first host tells where its door is, and the run's token unless the environment has one. With `may_lose` the
    hosts may come together anew without one that they lose.

    Raises: RankLost when one does not come; TeamError when it can not be reached.
    """
    if host == 0:
        secret = Secret(environment.token or secrets.token_hex(32), purpose)
        door = Door(rendezvous.address(), host, secret)
        first = door.place
        rendezvous.publish(purpose, json.dumps([*first, "" if environment.token else secret.token]))
    else:
        address, port, token = json.loads(rendezvous.wait_for_message(purpose))
        first = (address, port)
        secret = Secret(environment.token or token, purpose)
        door = Door(rendezvous.address(), host, secret)
    regrouping: Regrouping | None = None
    try:
        about = {"pid": os.getpid(), "machine": environment.machine}
        connected, of_all = connect_all(door, first, host, leaders, secret, JOIN_TIMEOUT, about)
        others = {other: said for other, said in of_all.items() if other != host and may_lose}
        beside = {other: said["pid"] for other, said in others.items() if said["machine"] == environment.machine}
        waits = Neighbours(leaders[host], leaders, beside, lease).waits_for
        if may_lose:
            silence, patience = _SILENCE * lease or _NEVER, _PATIENCE * lease or _NEVER
            places = {other: said["place"] for other, said in of_all.items()}
            regrouping = Regrouping(door, places, leaders, secret, silence, patience, waits)
    finally:
        if regrouping is None:
            door.close()
    return SocketCarrier(host, leaders, connected, waits, _SILENCE * lease, _PATIENCE * lease, regrouping)


@dataclass(frozen=True, kw_only=True)
class Collective(Generic[T]):
    """What the leaders of all hosts do together, and how who has done it lets another one have what it came to."""

    run: Callable[[], T]
    give: Callable[[int, T], None]  #: to a host
    take: Callable[[int], T]  #: from a host


@final
class Hosts:
    """All hosts of a team, as the leader of one sees them.

    [Note: a host is lost]
    Leaders do everything with each other in the same order, one thing after the other, and each of these is a barrier:
    nobody is through before all have begun. So when a host is lost, those that are left have done equally many, or some
    have done one more. They come together anew, and compare how many. Who has done less is given what the last one came
    to by who has done it, as that can not be done again: who was lost has taken part in it. What nobody has done is
    done again, by those who are left.
    """

    def __init__(self, carrier: Carrier, board: Board) -> None:
        self.carrier = carrier
        self.may_lose = False  #: go on without a host that is lost
        self._board = board
        self._num_done = 0
        self._give: Callable[[int], None] = lambda host: None  # what the last one came to
        self._behind: list[int] = []  # who has to be given it

    @property
    def one_is_missed(self) -> bool:
        """Whether one is lost, and this worker, alone on its host, need not compute what will be computed again."""
        is_alone, has_lost = self._board.roster.sizes[self.carrier.host] == 1, self.carrier.has_lost
        return self.may_lose and is_alone and has_lost

    def fail(self, error: BaseException) -> None:
        """Say in parting that this host's code has failed; of the loss of others nothing: they see to it themselves."""
        self.carrier.farewell = None if isinstance(error, RankLost) else Farewell.FAILED

    def go_through(self, collective: Collective[T], step: int | None = None) -> T | None:
        """Return what a collective came to; None when hosts were lost, and it is to be begun again by those left.

        Args:
            step: that it ends, unless it lies between two.

        Raises: RankLost when the others can not go on without who was lost.
        """
        source: int | None = None
        result: T
        while True:
            has_lost = self.carrier.has_lost
            try:
                if not (self.may_lose and has_lost):
                    result = collective.take(source) if source is not None else self._give_and(collective.run)
                    break
            except HostLost:
                if not self.may_lose:
                    raise
            source = self._come_together(step)
            if source is None:
                return None
        self._num_done += 1
        self._give = lambda host: collective.give(host, result)
        return result

    def _give_and(self, run: Callable[[], T]) -> T:
        while self._behind:
            self._give(self._behind[-1])
            self._behind.pop()
        return run()

    def exchange(self, what: str, payload: bytes) -> list[bytes | None]:
        """Return what each host gives to `what`, a meeting of all workers; None of those that are lost."""
        meeting = Collective(run=lambda: self.carrier.exchange(what, payload), give=self.give, take=self.take)
        while (received := self.go_through(meeting)) is None:
            pass
        return received

    def give(self, host: int, received: list[bytes | None]) -> None:
        """Send a host what an exchange came to."""
        packed = torch.frombuffer(bytearray(packed_list(received)), dtype=torch.uint8)
        for tensor in (torch.tensor([len(packed)]), packed):
            self.carrier.send(host, tensor, GIVEN_TAG).wait()

    def take(self, host: int) -> list[bytes | None]:
        """Return what a host gives."""
        size = torch.zeros(1, dtype=torch.int64)
        self.carrier.receive(host, size, GIVEN_TAG).wait()
        packed = torch.empty(int(size), dtype=torch.uint8)
        self.carrier.receive(host, packed, GIVEN_TAG).wait()
        return unpacked_list(packed.numpy().tobytes())

    def _come_together(self, step: int | None) -> int | None:
        """Go on with who is left; return the host that gives what the present collective came to, if any does."""
        carrier, own = self.carrier, self.carrier.host
        before = {own, *carrier.others}
        reports = carrier.come_together(self._num_done)
        most = max(reports.values())
        ahead = min(host for host, done in reports.items() if done == most)
        is_behind = self._num_done < most
        self._behind = [host for host, done in reports.items() if done < most] if ahead == own else []
        lost = sorted(before - reports.keys())
        named = ", ".join(str(carrier.leaders[host]) for host in lost)
        first_step = self._board.committed if step is None else step + is_behind
        if lost:
            self._board.losses.add(lost, first_step)
            if not _TOLD.issuperset(lost):  # several runs of a script lose the same
                notice(f"rank {carrier.leaders[own]} goes on without what was lost: the host of rank {named}.")
            _TOLD.update(lost)
        return ahead if is_behind else None


def between_devices(
    carrier: Carrier, device: Device, environment: Environment, rendezvous: Rendezvous, run_number: int
) -> PointToPoint:
    """Return the way between devices: by the hosts where they are no GPUs, or two workers share one."""
    if device.place.type != "cuda":
        return ByHosts(device, carrier)
    own = f"{environment.machine} {device.place}"
    seen = carrier.exchange("devices", own.encode())
    if len(set(seen)) < len(seen):
        return ByHosts(device, carrier)
    return nccl.connect(rendezvous.store(f"devices {run_number}"), carrier.host, carrier.num_hosts, device.place)
