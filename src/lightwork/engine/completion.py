"""Which buckets of this host's partial sums are complete, while backward of its last micro-batch still runs.

Backward tells when the gradient of a parameter is folded; who sends the buckets waits until all of theirs are. A
parameter that gets no gradient completes with the end of backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from lightwork.spec.layout import Layout


class Completion:
    """Counts down the parameters of each bucket; written by one thread and waited for by another."""

    def __init__(self, layout: Layout, backlog: int) -> None:
        """`backlog` is the number of complete buckets above which backward waits until some are taken."""
        self._parameters = [
            {block.parameter for block in layout.blocks[bucket.first_block : bucket.end_block]}
            for bucket in layout.buckets
        ]
        self._buckets: list[list[int]] = [[] for _ in layout.parameters]
        for bucket, parameters in enumerate(self._parameters):
            for parameter in parameters:
                self._buckets[parameter].append(bucket)
        self._missing = [0] * len(layout.buckets)
        self._changed = threading.Condition()
        self._backlog = backlog
        self._ahead = 0  # complete buckets that are not taken yet
        self._is_awaited = False  # whether the other thread waits for backward
        self._abandoned = False

    def begin(self, expected: Iterable[int]) -> None:
        """Start anew: these parameters are still to be folded."""
        expected = set(expected)
        with self._changed:
            self._abandoned, self._ahead = False, 0
            self._missing = [len(parameters & expected) for parameters in self._parameters]

    def folded(self, parameter: int) -> None:
        """Say that the gradient of an expected parameter is folded.

        Blocks: while the other thread is busy and the backlog too long.
        """
        for bucket in self._buckets[parameter]:
            self._missing[bucket] -= 1
            if self._missing[bucket] == 0:
                with self._changed:
                    self._ahead += 1
                    self._changed.notify_all()
                    self._changed.wait_for(self._has_room)

    def taken(self, count: int) -> None:
        """Say that so many buckets have left."""
        with self._changed:
            self._ahead -= count
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._abandoned or self._is_awaited or self._ahead <= self._backlog

    def complete(self) -> None:
        """Say that backward has ended: everything is folded."""
        with self._changed:
            self._missing = [0] * len(self._missing)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Say that backward has failed: who waits gets an error."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait(self, bucket: int) -> None:
        """Return when the bucket is complete.

        Raises: InterruptedError when backward has failed.
        """
        with self._changed:
            self._is_awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._abandoned or self._missing[bucket] == 0)
            self._is_awaited = False
            if self._abandoned:
                raise InterruptedError("backward has failed")
