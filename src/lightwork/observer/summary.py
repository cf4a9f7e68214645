"""Where a run stands, from the records of its workers' traces. Pure: records in, numbers out.

All workers tell the same of a step and of a loop. Who tells it first is believed, so that it does not matter who dies.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

#: Steps over which rates and shares are taken.
WINDOW = 100

#: Spans that make up a worker's time, and the activity that they count as.
ACTIVITY_OF = {
    "forward": "compute",
    "backward": "compute",
    "load": "load",
    "wait": "wait",
    "exchange": "update",
    "reduce": "update",
    "update": "update",
}


@dataclass
class WorkerSummary:
    """One worker, lately."""

    micro_batches: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))  #: of each step
    seconds: dict[str, float] = field(default_factory=dict)  #: by activity
    step: int = -1  #: the last one that it told of

    def add_seconds(self, activity: str, seconds: float) -> None:
        """Count time; what is older counts less."""
        for name in self.seconds:
            self.seconds[name] *= 0.99
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds


@dataclass
class Summary:
    """The whole run."""

    first: int = 0  #: the step at which this run began
    total: int | None = None  #: steps to be made in all
    step: int = -1  #: the last one done
    loss: float | None = None
    grad_norm: float | None = None
    noise: float | None = None  #: the noise scale, in samples
    workers: dict[int, WorkerSummary] = field(default_factory=dict, init=False)
    _times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)
    _amounts: dict[int, tuple[int, int, int]] = field(
        default_factory=dict, init=False
    )  # step -> samples, tokens, workers
    _newest: int = field(default=-1, init=False)
    _loop: int = field(default=-1, init=False)  # the step at which the present loop began
    first_time: float | None = None
    last_time: float | None = None

    def feed(self, rank: int, record: dict[str, Any]) -> None:
        """Take in one record of a worker's trace."""
        worker = self.workers.setdefault(rank, WorkerSummary())
        kind, name = record.get("kind"), record.get("name")
        if kind == "span":
            activity = ACTIVITY_OF.get(record["name"])
            if activity is not None:
                worker.add_seconds(activity, record["seconds"])
        elif kind == "event" and name == "steps":
            if self.first_time is None:
                self.first, self.first_time = record["first"], record["at"]
            if record["first"] >= self._loop or record["first"] < self._loop - WINDOW:  # else one of a loop before
                self._loop, self.total = record["first"], record["total"]
        elif kind == "event" and name == "step":
            self._feed_step(worker, record)

    def _feed_step(self, worker: WorkerSummary, record: dict[str, Any]) -> None:
        step = worker.step = record["step"]
        worker.micro_batches.append(len(record["micro_batches"]))
        if step > self._newest:
            self._newest = step
            while self._amounts and (oldest := next(iter(self._amounts))) < step - WINDOW:
                del self._amounts[oldest]
        if step >= self._newest - WINDOW:
            samples, tokens, reports = self._amounts.get(step, (0, 0, 0))
            self._amounts[step] = (samples + record["samples"], tokens + record["tokens"], reports + 1)
        if step > self.step or step < self.step - WINDOW:  # back to an earlier checkpoint
            self.step, self.loss, self.grad_norm = step, record["loss"], record["grad_norm"]
            self.noise = record.get("noise", {}).get("samples", self.noise)
            self._times.append((step, record["at"]))
            if self.first_time is None:
                self.first_time = record["at"]
            self.last_time = record["at"]

    @property
    def done(self) -> int:
        """Steps done by this run."""
        return max(0, self.step + 1 - self.first)

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the last steps."""
        if len(self._times) < 2:
            return None
        (first, start), (last, end) = self._times[0], self._times[-1]
        return (end - start) / (last - first) if last > first else None

    def rates(self) -> tuple[float, float]:
        """Return samples and tokens a second over the last steps; 0 where unknown."""
        return self._rates(self.seconds_per_step)

    def mean_rates(self) -> tuple[float, float]:
        """Return samples and tokens a second over this whole run, with the last steps' amounts for all; 0: unknown."""
        return self._rates(self.seconds / self.done if self.done else None)

    @property
    def seconds(self) -> float:
        """The time from the first step's beginning to the last one's end; 0 where either is unknown."""
        return 0.0 if self.first_time is None or self.last_time is None else self.last_time - self.first_time

    def _rates(self, seconds: float | None) -> tuple[float, float]:
        # Traces are not read up to the same step: one that some worker has not told of yet would count too little.
        most = max((reports for _, _, reports in self._amounts.values()), default=0)
        complete = [(samples, tokens) for samples, tokens, reports in self._amounts.values() if reports == most]
        if not seconds or not complete:
            return 0.0, 0.0
        samples = sum(s for s, _ in complete) / len(complete)
        tokens = sum(t for _, t in complete) / len(complete)
        return samples / seconds, tokens / seconds

    @property
    def seconds_left(self) -> float | None:
        """The time until the last step, if it is known."""
        seconds = self.seconds_per_step
        if seconds is None or self.total is None:
            return None
        return max(0, self.total - 1 - self.step) * seconds

    def shares(self) -> dict[int, float]:
        """Return each worker's part of the last micro-batches; none of one that is not heard of any more."""
        heard = {rank: worker for rank, worker in self.workers.items() if worker.step >= self.step - WINDOW}
        counts = {rank: sum(worker.micro_batches) for rank, worker in heard.items()}
        total = sum(counts.values())
        return {rank: count / total if total else 0.0 for rank, count in sorted(counts.items())}
