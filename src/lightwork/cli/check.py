"""`lightwork check train.py ARGS`: a few steps of a script, started in several ways; what differs, and why."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightwork.errors import UsageError
from lightwork.observer.findings import (
    PLAIN,
    Finding,
    Notes,
    first_difference,
    not_meant,
    of_another_cut,
    of_plain,
)

#: Seconds that one start may take.
_TIMEOUT = 300.0

#: The last line of a traceback.
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Disagreement|Failed|Lost|Full|Loss)\b.*:")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One way to start the script."""

    name: str
    how: str  #: after "with"
    num_workers: int
    slow: int = -1  #: the worker that is late in the second step
    settings: tuple[str, ...] = ()


ALONE = Start(name="alone", how="one worker", num_workers=1)
AGAIN = Start(name="again", how="when it is started again", num_workers=1)
TWO = Start(name="two", how="with two workers", num_workers=2)
THREE = Start(name="three", how="with three workers, of whom one is late", num_workers=3, slow=1)
SHARDED = Start(
    name="sharded",
    how="with placement='zero3'",
    num_workers=2,
    settings=("--set", "transport=group", "--set", "placement=zero3"),
)


WRITTEN_BY_HAND = Start(name="plain", how="in plain PyTorch", num_workers=1, slow=PLAIN)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "check",
        help="a few steps with one worker and with several: what differs, and why",
        description=(
            "Runs the first steps of a script with one worker (twice), two, and three of whom one is late, with "
            "smaller micro-batches, with sharded weights and in plain PyTorch, and compares all that is computed. "
            "Names the first thing that differs and where it comes from, and what is legal but probably not meant. "
            "Checkpoints of the run go to a temporary folder; what the script writes by itself, it writes."
        ),
    )
    parser.add_argument("--steps", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's arguments")


def carry_out(options: argparse.Namespace) -> int:
    """Check the script; return 1 when something differs or fails, else 0.

    Raises: UsageError for arguments that make no sense.
    """
    if not Path(options.script).is_file():
        raise UsageError(f"there is no script {options.script} in {os.getcwd()}. Give the path of a Python file.")
    if options.steps < 1:
        raise UsageError(f"--steps {options.steps} is not a number of steps from 1 on.")
    with tempfile.TemporaryDirectory(prefix="lightwork-check-") as folder:
        check = _Check(Path(folder), options.steps, [options.script, *options.arguments], quiet=options.json)
        findings = findings_of(check.start_all)
    if options.json:
        print(json.dumps([finding.to_json() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(_shown(finding))
        if not findings:
            print("lightwork check: the same bits in every way, and nothing that looks unmeant.")
    return int(any(finding.is_wrong for finding in findings))


def _shown(finding: Finding) -> str:
    place = f"{os.path.relpath(finding.where)}: " if finding.where else ""
    return f"{'wrong' if finding.is_wrong else 'look at'}: {place}{finding.text}"


#: Starts the script in these ways at once, and returns the notes of each, or that it failed.
StartAll = Callable[[Sequence[Start]], list[tuple[Notes, Finding | None]]]


def findings_of(start_all: StartAll) -> list[Finding]:
    """Start a script in every way, and return what was found."""
    (alone, problem), (again, _) = start_all([ALONE, AGAIN])
    if problem is not None:
        return [problem]
    found: list[Finding] = []
    difference = first_difference(alone, again, AGAIN.how)
    if difference is not None:
        # Other first weights are legal: a team begins with those of its first worker.
        found.append(replace(difference, is_wrong=difference.kind != "start"))
    smaller = _smaller(alone)
    for start in [TWO, THREE, SHARDED] + ([] if smaller is None else [smaller]):
        ((notes, problem),) = start_all([start])
        if problem is not None:
            found.append(problem)
        elif start is smaller:
            found += of_another_cut(alone, notes)
        elif difference is None or difference.kind == "start":  # else it differs here, too
            theirs = first_difference(alone, notes, start.how)
            if theirs is not None and theirs.kind != "start":
                found.append(theirs)
                difference = theirs
    ((notes, _),) = start_all([WRITTEN_BY_HAND])  # a script may use what the reference has not
    off = of_plain(alone, notes)
    found += [] if off is None else [off]
    return [*found, *not_meant(alone)]


def _smaller(notes: Notes) -> Start | None:
    """Return a start with micro-batches of half the size, where these can be halved."""
    sizes = {record["spec"]["micro_batch"] for record in notes.run.values()}
    if len(sizes) != 1 or min(sizes) % 2:
        return None
    half = min(sizes) // 2
    settings = ("--set", f"micro_batch={half}")
    return Start(name="smaller", how=f"with micro_batch={half}", num_workers=1, settings=settings)


class _Check:
    """The starts of one script."""

    def __init__(self, folder: Path, num_steps: int, script: Sequence[str], *, quiet: bool) -> None:
        self._folder = folder
        self._num_steps = num_steps
        self._script = script
        self._quiet = quiet

    def start_all(self, starts: Sequence[Start]) -> list[tuple[Notes, Finding | None]]:
        """Start the script in some ways at once; see `StartAll`."""
        running = [(start, self._start(start)) for start in starts]
        return [self._ended(start, process) for start, process in running]

    def _start(self, start: Start) -> subprocess.Popen[str]:
        self._say(f"{start.how} ...")
        folder = self._folder / start.name
        folder.mkdir()
        command = [sys.executable, "-m", "lightwork", "run", "-n", str(start.num_workers), "--quiet"]
        command += ["--run-dir", str(folder / "launch"), *start.settings, "-m", "lightwork.cli.checked"]
        command += [str(folder), str(self._num_steps), str(start.slow), *self._script]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _ended(self, start: Start, process: subprocess.Popen[str]) -> tuple[Notes, Finding | None]:
        try:
            text, _ = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            text, _ = process.communicate()
            text += f"\nit did not come to its end in {_TIMEOUT:.0f} s"
        notes = Notes.read(self._folder / start.name)
        if notes.num_workers == start.num_workers and notes.micros:
            return notes, None
        if process.returncode == 0 and not notes.run:
            text += "\nit has not called lightwork.distribute"
        return notes, _failure(start, text, self._script[0])

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(f"lightwork check: {text}", file=sys.stderr, flush=True)


def _failure(start: Start, text: str, script: str) -> Finding:
    """Return what is told of a start that failed: the last line of its error, and the script's line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("lightwork: its log is")]
    errors = [line for line in lines if _ERROR.match(line)]
    name = re.escape(Path(script).name)
    places = re.findall(rf'File "([^"]*{name})", line (\d+)', text)
    last = (errors or lines or ["it ended without a word"])[-1]
    return Finding("failure", f"{start.how} it fails: {last}", ":".join(places[-1]) if places else "")
