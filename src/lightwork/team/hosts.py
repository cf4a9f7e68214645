"""Connections to the other hosts: who is connected to whom, by which rendezvous, and for what."""

from __future__ import annotations

import json
import secrets

from lightwork.device.base import Device
from lightwork.notice import notice
from lightwork.team.environment import Environment
from lightwork.team.meeting_point import JOIN_TIMEOUT
from lightwork.team.rendezvous import Rendezvous
from lightwork.transport import nccl
from lightwork.transport.base import Carrier, PointToPoint
from lightwork.transport.doors import Door, Secret, connect_all
from lightwork.transport.relay import ByHosts
from lightwork.transport.sockets import SocketCarrier

#: In leases, in which a worker may be stopped whose process others see: for how long a machine may not answer, and a
#: process say nothing, which may be in one long C call.
_SILENCE, _PATIENCE = 5.0, 150.0


def connect_hosts(
    purpose: str, host: int, leaders: list[int], environment: Environment, rendezvous: Rendezvous, lease: float
) -> Carrier:
    """Return connections to all other hosts, whose leaders call this, too.

    The first host tells where its door is, and the run's token unless the environment has one.

    Raises: RankLost when one does not come; TeamError when it can not be reached.
    """
    rank = leaders[host]

    def late(other: int, seconds: float) -> None:
        notice(f"rank {rank} has been waiting for rank {other} for {seconds:.0f} s.")

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
    try:
        connected = connect_all(door, first, host, leaders, secret, JOIN_TIMEOUT)
    finally:
        door.close()
    return SocketCarrier(host, leaders, connected, late, _SILENCE * lease, _PATIENCE * lease)


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
