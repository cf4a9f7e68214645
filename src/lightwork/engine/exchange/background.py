"""One thread that runs calls, one after the other, beside the caller's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A daemon thread: an executor's would keep a process from ending while a call waits for a network.

    Owns: the thread, until `close`.
    """

    def __init__(self, name: str) -> None:
        self._calls: Queue[tuple[Callable[[], T], Future[T]] | None] = Queue()
        threading.Thread(target=self._run, name=f"lightwork {name}", daemon=True).start()

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Begin `call` as soon as the calls before it are done."""
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """End the thread after the calls that were started."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
