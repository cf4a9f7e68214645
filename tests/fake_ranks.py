"""A team whose workers are threads of this process, of which one runs at a time: fast, and in an order that is given.

Each worker calls `lightwork.distribute` with a model and optimizer of its own, and finds a team as a process does:
memory that is mapped once more, a board, mailboxes and, where there are several hosts, a network of queues. A *baton*
goes from thread to thread wherever one would wait for another, and at random where a real one might be interrupted:
after each visit of the board, between the sends of a network, and where a loop body calls `pause`. A seed chooses who
gets it next, who is slow, and what the network does early or late: one seed, one interleaving, the same every time.
Threads of the engine take part. When nobody can go on, all that wait are named (`Deadlock`).

What is global in a process is put aside with the baton: random state, hooks, standard output, exit handlers.
"""

from __future__ import annotations

import atexit
import contextlib
import random
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

from lightwork.run.exit import EXITS, Exits
from lightwork.team import environment as environments
from lightwork.team import finding
from lightwork.team.environment import Environment, Launcher
from lightwork.team.rendezvous import IfKilled, Progress, Rendezvous
from lightwork.transport.base import Carrier, Pending
from lightwork.transport.lock import FileLock
from lightwork.transport.signal import Signal

T = TypeVar("T")

#: Where the code under test makes the carriers between hosts.
_CARRIER_IS_MADE_IN = "lightwork.team.join.connect_hosts"

_SLOW, _FAST = 0.03, 1.0

#: How often the baton is handed on where it could be kept.
_RESTLESSNESS = (0.02, 0.1, 0.3)


class Deadlock(AssertionError):
    """All threads wait for each other."""


class _Over(BaseException):
    """The team has ended, or another worker has failed: this thread ends."""


class Process:
    """What every process has of its own: of one worker, put aside while another runs."""

    def __init__(self, rank: int, environment: Environment | None = None, speed: float = _FAST) -> None:
        self.rank = rank
        self.environment = environment
        self.speed = speed
        self.rendezvous: Rendezvous | None = None
        self.exit_handlers: list[Callable[[], object]] = []
        self._numpy = np.random.MT19937()  # put in place of the global one: far faster than to copy its state
        self._numpy.state = np.random.get_state(legacy=False)
        self.put_aside()
        self._exits = dict(vars(Exits())) if environment is not None else dict(vars(EXITS))

    def put_aside(self) -> None:
        self._random = torch.default_generator.get_state(), random.getstate()
        self._streams = sys.stdout, sys.excepthook
        self._exits = dict(vars(EXITS))
        self._mkldnn = torch._C._get_mkldnn_enabled()

    def take_up(self) -> None:
        torch.default_generator.set_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_bit_generator(self._numpy)
        sys.stdout, sys.excepthook = self._streams
        vars(EXITS).update(self._exits)
        torch._C._set_mkldnn_enabled(self._mkldnn)


@dataclass(eq=False)
class _Task:
    """A thread, of one worker."""

    name: str
    process: Process
    is_main: bool
    wake: Any = field(default_factory=threading.Lock)
    is_ready: Callable[[], bool] = lambda: True
    waits_for: str = "its start"
    is_starting_thread: bool = False


_tasks: dict[int, tuple[Baton, _Task]] = {}  # by thread


def _own() -> tuple[Baton, _Task] | None:
    """Return what the calling thread takes part in."""
    return _tasks.get(threading.get_ident())


def pause() -> None:
    """Let others run, maybe. Does nothing in a real process."""
    if own := _own():
        own[0].pause()


class Baton:
    """Who has it runs; it is handed to a thread that is ready, chosen by the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._restlessness = self.random.choice(_RESTLESSNESS)
        self.history: list[str] = []  #: who had it, in order
        self._tasks: list[_Task] = []
        self._holder: _Task | None = None
        self._is_over = False
        self._all_ended = threading.Lock()
        self._errors: list[BaseException] = []

    def run(self, mains: Sequence[tuple[Process, Callable[[], None]]]) -> None:
        """Run a function for each process, until all have ended; raise the first error."""
        self._all_ended.acquire()
        before, numpy_before = Process(-1), np.random.get_bit_generator()
        for process, function in mains:
            thread = threading.Thread(target=self.take_part(f"rank {process.rank}", process, function, is_main=True))
            thread.daemon = True
            thread.start()
        with _in_place(self):
            self._hand_on()
            self._all_ended.acquire()
        before.take_up()
        np.random.set_bit_generator(numpy_before)
        if self._errors:
            raise self._errors[0]

    def take_part(
        self, name: str, process: Process, function: Callable[[], None], *, is_main: bool = False
    ) -> Callable[[], None]:
        """Return what a new thread is to run."""
        task = _Task(name, process, is_main)
        task.wake.acquire()
        self._tasks.append(task)

        def work() -> None:
            task.wake.acquire()
            _tasks[threading.get_ident()] = self, task
            try:
                if not self._is_over:
                    function()
            except _Over:
                pass
            except BaseException as error:
                self._errors.append(error)
                self._is_over = True
            finally:
                del _tasks[threading.get_ident()]
                self._tasks.remove(task)
                self._is_over |= not any(other.is_main for other in self._tasks)
                self._hand_on()

        return work

    def pause(self) -> None:
        """Hand on the baton, maybe."""
        if not self._is_over:
            self.wait_until(lambda: True, "its turn")

    def wait_until(self, is_ready: Callable[[], bool], what: str) -> None:
        """Return when `is_ready` returns True and it is this thread's turn. Any thread calls it; it only looks."""
        if self._is_over:
            raise _Over
        if is_ready() and self.random.random() > self._restlessness:
            return
        task = self._holder
        assert task is not None
        task.is_ready, task.waits_for = is_ready, what
        if self._hand_on() is not task:
            task.wake.acquire()
        if self._is_over:
            raise _Over

    def _hand_on(self) -> _Task | None:
        """Wake the thread that is next and return it; the caller goes to sleep, or ends, unless it is the one."""
        if not self._tasks:
            self._all_ended.release()
            return None
        ready = [task for task in self._tasks if self._is_over or task.is_ready()]
        if not ready:
            waiting = "\n".join(f"  {task.name} waits for {task.waits_for}" for task in self._tasks)
            self._errors.append(Deadlock(f"nobody can go on:\n{waiting}"))
            self._is_over = True
            ready = self._tasks
        chosen = self.random.choices(ready, [task.process.speed for task in ready])[0]
        holder, self._holder = self._holder, chosen
        self.history.append(chosen.name)
        if chosen is holder:
            return chosen
        if holder is None or holder.process is not chosen.process:
            if holder is not None:
                holder.process.put_aside()
            chosen.process.take_up()
        chosen.wake.release()
        return chosen


# --- what a worker finds ----------------------------------------------------------------------------------------------


class FakeRendezvous(Rendezvous):
    """Messages in a dictionary; a store is a network of queues."""

    def __init__(self, baton: Baton, messages: dict[str, str], networks: dict[str, Network]) -> None:
        self._baton = baton
        self._messages = messages
        self._networks = networks
        self._runs = 0

    def next_run(self) -> int:
        self._runs += 1
        return self._runs

    def comes_first(self, key: str) -> bool:
        is_first = f"{key} was asked for" not in self._messages
        self._messages[f"{key} was asked for"] = ""
        return is_first

    def publish(self, key: str, message: str) -> None:
        self._messages[key] = message

    def wait_for_message(self, key: str, what: str = "", timeout: float | None = None) -> str:
        self._baton.wait_until(lambda: key in self._messages, f"the message {key!r}")
        return self._messages[key]

    def store(self, key: str) -> Any:
        return self._networks.setdefault(key, Network(self._baton))

    def address(self) -> str:
        return "127.0.0.1"

    def report(self, progress: Progress) -> None:
        pass

    def report_if_killed(self, follows: IfKilled) -> None:
        pass


class _Message(Pending):
    """One side of a tensor on its way."""

    def __init__(self, network: Network, tensor: torch.Tensor, what: str) -> None:
        self.network = network
        self.tensor = tensor
        self.what = what
        self.other: _Message | None = None  #: the other side, once it is there
        self.is_done = False

    def wait(self) -> None:
        self.network.baton.wait_until(lambda: self.is_done or self.other is not None, self.what)
        self.transfer()

    def transfer(self) -> None:
        if not self.is_done and self.other is not None:
            received, sent = (self, self.other) if isinstance(self, _Received) else (self.other, self)
            source, target = (message.tensor.view(-1).view(torch.uint8) for message in (sent, received))
            assert source.numel() == target.numel(), "as many bytes are sent as are received"
            target.copy_(source)
            self.is_done = self.other.is_done = True


class _Sent(_Message):
    pass


class _Received(_Message):
    pass


class Network:
    """Between hosts: a queue of each sender, receiver and tag, for both sides.

    A tensor is copied when it is sent, when both sides are there, or when one of them is waited for, as it comes. What
    is awaited reads as NaN until then.
    """

    def __init__(self, baton: Baton) -> None:
        self.baton = baton
        self.sides: dict[tuple[int, int, int], tuple[deque[_Sent], deque[_Received]]] = defaultdict(
            lambda: (deque(), deque())
        )

    def match(self, key: tuple[int, int, int]) -> None:
        sent, received = self.sides[key]
        while sent and received:
            one, other = sent.popleft(), received.popleft()
            was_done = one.is_done
            one.other, other.other, one.is_done = other, one, False
            if was_done or self.baton.random.random() < 0.5:
                one.transfer()


class FakeCarrier(Carrier):
    """A host's end of a network."""

    def __init__(self, network: Network, host: int, leaders: list[int]) -> None:
        super().__init__(host, leaders)
        self._network = network

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        pause()
        is_kept = self._network.baton.random.random() < 0.5
        side = _Sent(self._network, tensor.clone() if is_kept else tensor, f"host {host} to receive {tag}")
        side.is_done = is_kept
        key = self.host, host, tag
        self._network.sides[key][0].append(side)
        self._network.match(key)
        return side

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        tensor.view(-1).view(torch.uint8).fill_(0xFF)
        side = _Received(self._network, tensor, f"host {host} to send {tag}")
        key = host, self.host, tag
        self._network.sides[key][1].append(side)
        self._network.match(key)
        return side

    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        def senders() -> list[int]:
            return [host for host in range(self.num_hosts) if self._network.sides[host, self.host, tag][0]]

        self._network.baton.wait_until(lambda: bool(senders()), f"any host to send {tag}")
        host = self._network.baton.random.choice(senders())
        self.receive(host, tensor, tag).wait()
        return host

    def close(self) -> None:
        pass


def _fake_carrier(
    purpose: str,
    host: int,
    leaders: list[int],
    _environment: Environment,
    rendezvous: FakeRendezvous,
    _lease: float,
    *,
    may_lose: bool = False,
) -> Carrier:
    return FakeCarrier(rendezvous.store(purpose), host, leaders)


# --- what is put in place of waiting ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_place(baton: Baton) -> Iterator[None]:
    """Let threads that take part hand on the baton where they would wait; all others wait as ever."""
    wait_for_signal, unlock = Signal.wait_for_change, FileLock.__exit__
    wait_for_condition, start_thread = threading.Condition.wait, threading.Thread.start
    register = atexit.register

    def signal_wait(self: Signal, seen: int, seconds: float) -> bool:
        if _own() is None:
            return wait_for_signal(self, seen, seconds)
        baton.wait_until(lambda: self.value != seen, "the signal")
        return True

    def lock_exit(self: FileLock, *error: Any) -> None:
        unlock(self, *error)
        if error[0] is None:
            pause()

    def condition_wait(self: Any, timeout: float | None = None) -> bool:
        own = _own()
        if own is None or timeout is not None or own[1].is_starting_thread:
            return wait_for_condition(self, timeout)
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        state = self._release_save()
        try:
            baton.wait_until(lambda: not waiter.locked(), "a thread of its own")
        finally:
            self._acquire_restore(state)
        return True

    def thread_start(self: threading.Thread) -> None:
        if own := _own():
            task = own[1]
            self.run = baton.take_part(f"{task.name}, {self.name}", task.process, self.run)  # type: ignore[method-assign]
            task.is_starting_thread = True
            try:
                start_thread(self)
            finally:
                task.is_starting_thread = False
        else:
            start_thread(self)

    def at_exit(function: Callable[[], object], *args: Any, **named: Any) -> object:
        if own := _own():
            own[1].process.exit_handlers.append(lambda: function(*args, **named))
            return function
        return register(function, *args, **named)

    def process() -> Process:
        own = _own()
        assert own is not None, "distribute was called beside the team"
        return own[1].process

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (Signal, "wait_for_change", signal_wait),
            (FileLock, "__exit__", lock_exit),
            (threading.Condition, "wait", condition_wait),
            (threading.Thread, "start", thread_start),
            (atexit, "register", at_exit),
            (environments, "read", lambda: process().environment),
            (finding, "find", lambda _environment: process().rendezvous),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch(_CARRIER_IS_MADE_IN, _fake_carrier))
        yield


def run_ranks(
    num_workers: int,
    function: Callable[[], T],
    *,
    seed: int = 0,
    hosts: Sequence[int] | None = None,
    settings: Mapping[str, object] | None = None,
    run_dir: str | None = None,
    baton: Baton | None = None,
) -> list[T]:
    """Return what `function` returned on each worker of a team; raise the first error of one.

    Args:
        seed: of the interleaving.
        hosts: the number of workers of each host; one host for all, unless given.
        settings: as `lightwork run --set` takes them.
        baton: a new one, in place of one of the seed.
    """
    baton = baton or Baton(seed)
    machines = [host for host, size in enumerate(hosts or [num_workers]) for _ in range(size)]
    messages: dict[str, str] = {}
    networks: dict[str, Network] = {}
    values: dict[int, T] = {}

    def main(process: Process) -> None:
        try:
            values[process.rank] = function()
            while process.exit_handlers:
                process.exit_handlers.pop()()
        finally:
            if sys.stdout is not stdout:  # it was silenced
                sys.stdout.close()
                sys.stdout = stdout

    stdout = sys.stdout
    mains = []
    for rank in range(num_workers):
        environment = Environment(
            rank=rank,
            world_size=num_workers,
            local_rank=rank - machines.index(machines[rank]),
            launcher=Launcher.LIGHTWORK if hosts is None else Launcher.TORCHRUN,
            machine=f"machine {machines[rank]}",
            run_dir=run_dir,
            settings={"trace": False, **(settings or {})},
        )
        process = Process(rank, environment, baton.random.choice((_FAST, _FAST, _FAST, _SLOW)))
        process.rendezvous = FakeRendezvous(baton, messages, networks)
        mains.append((process, lambda process=process: main(process)))
    baton.run(mains)
    return [values[rank] for rank in range(num_workers)]
