"""How the hosts of a team come together anew when one of them is lost.

[Note: coming together anew]
Who has lost a connection ends all of its own, so that every host comes here as soon as it wants something of another.
The lowest of those that live gathers the others: each host calls at the doors of the lower ones, in order, until one is
open, and waits there for an answer. A door that is closed tells that its process has ended. Who gathers waits for every
host that is neither there nor ended, be it that it still computes; then it tells those that came who goes on, and these
connect to each other, too. If anybody is lost over it, all begin anew.

A generation is such a set of connections. What a host that was left out sent before is in none of them, so it can
change nothing; and it is told so where it calls.

[Note: which half goes on]
A machine that does not answer may be cut off and not dead, and train on. So of two parts that do not reach each other
the larger one goes on, or of two equal ones that with the lowest host. Hosts whose processes are known to have ended
count for neither: if all that are missing have, the last one goes on alone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, final

from lightwork.errors import RankLost
from lightwork.transport.doors import (
    Caller,
    Door,
    NotOurs,
    Place,
    Secret,
    Silent,
    call,
    is_there,
    receive_message,
    send_message,
)

#: Seconds between two looks at who is missing, for a connection to be made, and for a message once it has begun.
_LOOK, _CONNECT, _MESSAGE = 0.05, 1.0, 10.0


class _Fate(Enum):
    ENDED = auto()  # its process has
    UNREACHABLE = auto()


class _OverAgainError(Exception):
    """Somebody was lost over it."""


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """The hosts that go on."""

    reports: Mapping[int, int]  #: by host, what it has said of itself
    connected: Mapping[int, socket.socket]  #: to each other one


@final
class Regrouping:
    """One host's part in it: see [Note: coming together anew].

    Owns: its door, until `close`.
    """

    def __init__(
        self,
        door: Door,
        places: Mapping[int, Place],
        leaders: Sequence[int],
        secret: Secret,
        silence: float,
        patience: float,
        waits: Callable[[int, float], None] = lambda host, seconds: None,
    ) -> None:
        """Be the host of the door.

        Args:
            places: where the doors of all hosts are.
            leaders: the rank that speaks for each host, for messages.
            silence: seconds after which a machine that does not answer can not be reached.
            patience: the same for a process.
            waits: told of those that are waited for, some times a second.
        """
        self.hosts = sorted(places)  #: those that were not lost
        self._door = door
        self._host = door.host
        self._places = places
        self._leaders = leaders
        self._secret = secret
        self._silence = silence
        self._patience = patience
        self._generation = 0
        self._waits = waits
        self._begun = 0.0
        self._heard: dict[int, float] = {}  # when a host was last known to be there
        door.answer = self._turn_away

    def come_together(self, report: int) -> Regrouped:
        """Return the hosts that go on, with what each of them reports, when all are connected.

        Blocks: as long as any of them computes.
        Raises: RankLost when this host, with those that it reaches, can not go on.
        """
        self._begun = time.monotonic()
        while True:
            made: list[socket.socket] = []
            try:
                return self._try(report, made)
            except _OverAgainError:
                for one in made:
                    one.close()
            except BaseException:
                for one in made:
                    one.close()
                raise

    def close(self) -> None:
        """Let nobody in any more."""
        self._door.close()

    def _try(self, report: int, made: list[socket.socket]) -> Regrouped:
        self._heard = dict.fromkeys(self.hosts, time.monotonic())
        lost: dict[int, _Fate] = {}
        for lower in [host for host in self.hosts if host < self._host]:
            found = self._ask(lower, report, made)
            if isinstance(found, _Fate):
                lost[lower] = found
            else:
                return self._follow(lower, *found, made)
        return self._gather(report, lost, made)

    # --- who does not gather ----------------------------------------------------------------------------------------

    def _ask(self, lower: int, report: int, made: list[socket.socket]) -> tuple[socket.socket, dict[str, Any]] | _Fate:
        """Call at a lower host's door, and wait for its answer."""
        message = {"wants": self._generation + 1, "report": report}
        while True:
            try:
                connected = call(
                    self._places[lower], lower, self._host, self._secret, message, _CONNECT, self._patience
                )
                break
            except (ConnectionRefusedError, NotOurs):
                return _Fate.ENDED
            except Silent:
                return _Fate.UNREACHABLE
            except OSError as error:
                if time.monotonic() - self._heard[lower] > self._silence:
                    return _Fate.ENDED if isinstance(error, ConnectionError) else _Fate.UNREACHABLE
            time.sleep(_LOOK)  # it may be about to end: its connections close one after the other
        made.append(connected)
        _watch_the_way(connected, self._silence)
        heard = time.monotonic()
        while True:
            try:
                if is_there(connected, _CONNECT):
                    heard = time.monotonic()
                    told = receive_message(connected, heard + _MESSAGE)
                    if told:
                        return connected, json.loads(told)
            except TimeoutError:
                return _Fate.UNREACHABLE
            except (OSError, ValueError) as error:
                raise _OverAgainError from error
            self._wait_for([lower])
            if time.monotonic() - heard > self._patience:
                return _Fate.UNREACHABLE

    def _follow(
        self, gatherer: int, connected: socket.socket, told: dict[str, Any], made: list[socket.socket]
    ) -> Regrouped:
        """Connect to the others that go on."""
        if "end" in told:
            raise RankLost(str(told["end"]))
        reports = {int(host): report for host, report in told["reports"].items()}
        self._settle(told["generation"], list(reports))
        of_all = {gatherer: connected}
        message = {"generation": self._generation}
        for other in self.hosts:
            if other < self._host and other != gatherer:
                try:
                    of_all[other] = call(
                        self._places[other], other, self._host, self._secret, message, _CONNECT, self._patience
                    )
                except OSError as error:
                    raise _OverAgainError from error
                made.append(of_all[other])
        while missing := [host for host in self.hosts if host != self._host and host not in of_all]:
            came = self._door.next(time.monotonic() + _LOOK)
            if came is None:
                if any(self._fate(host) for host in missing):
                    raise _OverAgainError
                self._wait_for(missing)
            elif came.message == message and came.host in missing:
                of_all[came.host] = came.socket
                made.append(came.socket)
            elif "wants" in came.message and not _has_gone(came):  # it has not heard what this one was told
                self._door.put_back(came)
                raise _OverAgainError
            else:
                came.socket.close()
        return Regrouped(reports=reports, connected=of_all)

    # --- who gathers ------------------------------------------------------------------------------------------------

    def _gather(self, report: int, lost: dict[int, _Fate], made: list[socket.socket]) -> Regrouped:
        """Wait for every other host, or to know of its end, and tell those that came who goes on."""
        callers: dict[int, Caller] = {}
        while missing := [host for host in self.hosts if host not in callers | lost and host != self._host]:
            came = self._door.next(time.monotonic() + _LOOK)
            if came is not None and came.host in self.hosts and "wants" in came.message and not _has_gone(came):
                callers[came.host] = came
                made.append(came.socket)
            elif came is not None:
                came.socket.close()
            else:
                fates = {host: self._fate(host) for host in missing}
                lost |= {host: fate for host, fate in fates.items() if fate is not None}
                callers = {host: caller for host, caller in callers.items() if not _has_gone(caller)}
                self._wait_for(missing)
        self._refuse_to_split(list(callers), lost)
        reports = {self._host: report, **{host: caller.message["report"] for host, caller in callers.items()}}
        generation = max([self._generation + 1, *(caller.message["wants"] for caller in callers.values())])
        self._tell(callers, {"generation": generation, "reports": reports})
        self._settle(generation, list(reports))
        return Regrouped(reports=reports, connected={host: caller.socket for host, caller in callers.items()})

    def _tell(self, callers: Mapping[int, Caller], message: Mapping[str, object]) -> None:
        for caller in callers.values():
            self._door.release(caller)
            caller.socket.settimeout(_MESSAGE)
            try:
                send_message(caller.socket, json.dumps(message).encode())
            except OSError as error:
                raise _OverAgainError from error

    def _refuse_to_split(self, here: list[int], lost: Mapping[int, _Fate]) -> None:
        """Raise RankLost where another part of the team goes on: [Note: which half goes on]."""
        here = [self._host, *here]
        away = [host for host, fate in lost.items() if fate is _Fate.UNREACHABLE]
        if len(here) > len(away) or (len(here) == len(away) and min(here) < min(away)):
            return
        named = ", ".join(str(self._leaders[host]) for host in sorted(away))
        raise RankLost(
            f"rank {self._leaders[self._host]} can not reach rank {named} any more, and they may go on without it: of "
            "a team whose network is cut the larger part goes on, or of two equal ones that with the lowest rank.",
            self._leaders[min(away)],
        )

    # --- the others -------------------------------------------------------------------------------------------------

    def _fate(self, host: int) -> _Fate | None:
        """Return what has become of a host that is missing; None if it lives."""
        now = time.monotonic()
        try:
            place, secret = self._places[host], self._secret
            call(place, host, self._host, secret, {"probe": True}, _CONNECT, _CONNECT).close()
        except (ConnectionRefusedError, NotOurs):
            return _Fate.ENDED
        except ConnectionError:
            limit = self._patience
        except OSError:
            limit = self._silence
        else:
            self._heard[host] = now
            return None
        return _Fate.UNREACHABLE if now - self._heard[host] > limit else None

    def _settle(self, generation: int, hosts: list[int]) -> None:
        """Let it be known who goes on."""
        self._generation, self.hosts = generation, sorted(hosts)
        kept = []
        while (came := self._door.next(0.0)) is not None:
            if not self._turn_away(came):
                kept.append(came)
        for caller in kept:
            self._door.put_back(caller)

    def _turn_away(self, caller: Caller) -> bool:
        """Tell a caller that was left out so, and return whether it was."""
        if caller.host in self.hosts or caller.message.get("wants", 0) > self._generation:
            return False
        who, other = self._leaders[caller.host], self._leaders[self._host]
        with contextlib.suppress(OSError):
            text = f"rank {who} was taken for lost, and rank {other} and others go on without it."
            send_message(caller.socket, json.dumps({"end": text}).encode())
        caller.socket.close()
        return True

    def _wait_for(self, hosts: Sequence[int]) -> None:
        for host in hosts:
            self._waits(host, time.monotonic() - self._begun)


def _has_gone(caller: Caller) -> bool:
    """Return whether who has called has closed the connection since: it says nothing more while it waits."""
    try:
        return is_there(caller.socket, 0.0)
    except OSError:
        return True


def _watch_the_way(connected: socket.socket, silence: float) -> None:
    """Let the kernel end a connection on which nothing moves when the other machine does not answer any more."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(AttributeError, OSError):  # names of Linux's
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(min(silence, 100.0))))
