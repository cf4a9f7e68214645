"""The progress display: in a terminal a live one, elsewhere a line now and then. It reads a run directory's traces."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lightwork.observer.summary import Summary
from lightwork.observer.tail import Tail
from lightwork.units import format_count, format_seconds

#: Seconds between two refreshes of the live display; each costs a few milliseconds of a core that a worker may need.
REFRESH_SECONDS = 0.5

#: Refreshes between which output waits for the next one, when there is much of it: drawing costs more than writing.
_WRITES_PER_REFRESH = 2

#: Bytes of traces that are parsed in a refresh, of all workers together (about 10 ms per MB of a core, 2026-11).
_READ_BYTES = 64 * 1024

#: Seconds between two plain lines, where there is no terminal.
LINE_SECONDS = 10.0

_COLOURS = {"compute": "green", "update": "cyan", "load": "yellow", "wait": "bright_black"}


class _Watched:
    """One run of the script: its traces, and where it stands."""

    def __init__(self, folder: Path, name: str, num_workers: int, *, skip_existing: bool) -> None:
        self.name = name  #: empty for that of the directory itself
        self.summary = Summary()
        self._folder = folder / "trace"
        self._max_read = max(_READ_BYTES // num_workers, 16 * 1024)
        self._tails: list[Tail] = []
        for _ in range(num_workers):
            self._add(skip_existing=skip_existing)

    def _add(self, *, skip_existing: bool = False) -> None:
        path, keep = self._folder / f"rank{len(self._tails)}.jsonl", '"name": "steps"'
        self._tails.append(Tail(path, max_read=self._max_read, keep=keep, skip_existing=skip_existing))

    def read(self) -> None:
        while (self._folder / f"rank{len(self._tails)}.jsonl").exists():  # the team has grown
            self._add()
        for rank, tail in enumerate(self._tails):
            for record in tail.read():
                self.summary.feed(rank, record)


class RunProgress:
    """Shows a run's progress on standard error, and passes the main worker's output on, above it.

    Owns: the bottom lines of the terminal, until `close`.
    """

    def __init__(
        self,
        run_dir: Path,
        num_workers: int,
        *,
        quiet: bool,
        live: bool | None = None,
        skip_existing: bool = False,
    ) -> None:
        """Begin to show a run.

        `live` says whether standard error is a terminal to draw on; left out, rich decides, which FORCE_COLOR
        persuades. With `skip_existing` what the run directory holds already, from an earlier run, is not looked at.
        """
        self._run_dir = run_dir
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._num_workers = num_workers
        self._watched = [_Watched(run_dir, "", num_workers, skip_existing=skip_existing)]
        self._find_runs(skip_existing=skip_existing)
        self._shown_at = time.monotonic()
        self._pending: list[tuple[TextIO, bytes]] = []
        self._wrote_at = 0.0
        self._is_within_line = False  # of the script's
        self._live: Live | None = None
        if (self._console.is_terminal if live is None else live) and not quiet:
            # No redirection: workers are forked from here, and would inherit streams that wrap and draw.
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    @property
    def last_step(self) -> int:
        """The last step that was done, -1 for none."""
        return self._summary.step

    @property
    def _summary(self) -> Summary:
        """That of the run which has done a step last."""
        return max((one.summary for one in self._watched), key=lambda summary: summary.last_time or 0.0)

    def _find_runs(self, *, skip_existing: bool) -> None:
        """Watch what has a folder of its own in the run directory: a run with a name, or a script's second."""
        known = {one.name for one in self._watched}
        for trace in sorted(self._run_dir.glob("*/trace")):
            if trace.parent.name not in known:
                name = trace.parent.name
                self._watched.append(_Watched(trace.parent, name, self._num_workers, skip_existing=skip_existing))

    def write_out(self, data: bytes) -> None:
        """Show the main worker's standard output."""
        self._write(sys.stdout, data)

    def write_error(self, data: bytes) -> None:
        """Show the main worker's standard error."""
        self._write(sys.stderr, data)

    def tick(self) -> None:
        """Refresh, if it is time to."""
        now = time.monotonic()
        if now - self._wrote_at >= REFRESH_SECONDS / _WRITES_PER_REFRESH:
            self._flush()
        if self._quiet or now - self._shown_at < (REFRESH_SECONDS if self._live else LINE_SECONDS):
            return
        self._shown_at = now
        self.update()
        # Not into a line of the script's that is not complete.
        if self._live is not None and self._live.is_started:
            self._live.update(self._render(), refresh=True)
        elif self._live is None and self._summary.step >= 0 and not self._is_within_line:
            self._print(self.line())

    def update(self) -> None:
        """Read what the workers have written since."""
        self._find_runs(skip_existing=False)
        for one in self._watched:
            one.read()

    def close(self, *, finished: bool) -> None:
        """Take the display away; if the run came to its end, with one line on what it did."""
        self._flush()
        self.update()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if finished and not self._quiet and self._summary.done:
            if self._is_within_line:
                self._print("")
            for line in self.final_line().splitlines():
                self._print(line)

    def line(self) -> str:
        """Return where the run stands, on one line."""
        summary = self._summary
        name = next(one.name for one in self._watched if one.summary is summary)
        parts = [
            f"{name}:" if name else "",
            f"step {summary.step + 1}{'' if summary.total is None else f'/{summary.total}'}",
        ]
        if summary.loss is not None:
            parts.append(f"loss {summary.loss:.4g}")
        if summary.grad_norm is not None:
            parts.append(f"grad norm {summary.grad_norm:.3g}")
        if summary.noise is not None:
            parts.append(f"noise scale {summary.noise:.3g}")
        parts.append(_rate(summary.rates()))
        if summary.seconds_left is not None:
            parts.append(f"time left {format_seconds(summary.seconds_left)}")
        return "  ".join(part for part in parts if part)

    def final_line(self) -> str:
        """Return what the run did, on one line; of several, on one each."""
        lines = []
        for one in (one for one in self._watched if one.summary.done):
            summary, workers = one.summary, self._num_workers
            rate = _rate(summary.mean_rates())
            lines.append(
                f"lightwork: {f'{one.name}: ' if one.name else ''}{summary.done} steps in "
                f"{format_seconds(summary.seconds)} by {workers} worker{'s' if workers > 1 else ''}"
                f"{', ' if rate else ''}{rate}; traces and logs in {_short(self._run_dir / one.name)}"
            )
        return "\n".join(lines)

    def _render(self) -> Group:
        summary = self._summary
        if summary.step < 0:
            return Group(Text("lightwork: starting ...", style="bright_black"))
        workers = Table.grid(padding=(0, 1))
        for rank, share in summary.shares().items():
            workers.add_row(Text(f"rank {rank}", style="bold"), _bar(share), Text(f"{share:4.0%}"), self._times(rank))
        lines = Table.grid()  # a bar by itself does not end its line
        lines.add_row(Text(self.line(), style="bold"))
        if summary.total is not None:
            lines.add_row(ProgressBar(total=max(1, summary.total), completed=summary.step + 1, width=60))
        lines.add_row(workers)
        return Group(lines)

    def _times(self, rank: int) -> Text:
        seconds = self._summary.workers[rank].seconds
        total = sum(seconds.values()) or 1.0
        text = Text()
        for name, colour in _COLOURS.items():
            text.append(f" {name} {seconds.get(name, 0.0) / total:.0%}", style=colour)
        return text

    def _write(self, stream: TextIO, data: bytes) -> None:
        self._pending.append((stream, data))
        if self._live is None or time.monotonic() - self._wrote_at >= REFRESH_SECONDS / _WRITES_PER_REFRESH:
            self._flush()

    def _print(self, line: str) -> None:
        with self._unless_full(sys.stderr):
            self._console.print(line, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _unless_full(self, stream: TextIO) -> Iterator[None]:
        """Write to `stream` inside. One that leads to a full disk leads nowhere from then on: training goes on.

        Raises: BrokenPipeError when nobody reads it any more.
        """
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # also what is still in its buffer
            os.close(nowhere)
            if stream is not sys.stderr:
                self._print(f"lightwork: output can not be written ({error.strerror}); the rest is in the logs alone.")

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if self._live is not None and self._live.is_started:
            # The live lines are taken away first, and come back below what is written.
            self._live.update(Text(""), refresh=True)
            self._live.stop()
        data = b""
        for stream, data in pending:
            with self._unless_full(stream):
                stream.buffer.write(data)
                stream.buffer.flush()
        self._wrote_at = time.monotonic()
        self._is_within_line = not data.endswith(b"\n")
        # After a line that is not complete they stay away: they would take it with them when they go.
        if self._live is not None and data.endswith(b"\n"):
            self._live.start()
            self._live.update(self._render(), refresh=True)


def _rate(rates: tuple[float, float]) -> str:
    samples, tokens = rates
    if tokens:
        return f"{format_count(tokens)} tokens/s"
    return f"{format_count(samples)} samples/s" if samples else ""


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=24, complete_style="green", finished_style="green")


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
