"""`lightwork run`: start a team on this host."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from lightwork.errors import SpecError, UsageError
from lightwork.launcher.beginnings import Beginnings, noted_signals
from lightwork.launcher.ended import Ended
from lightwork.launcher.local import launch, log_of, preload
from lightwork.launcher.replacing import LONG_ENOUGH, RESTARTS
from lightwork.launcher.script import Script
from lightwork.launcher.supervisor import Outcome
from lightwork.observer.progress import RunProgress
from lightwork.run.folder import create_run_dir, prepare_run_dir, write_records
from lightwork.spec.plan import SETTABLE, Carriage
from lightwork.team.rendezvous import Progress

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

#: Bytes at the end of a log in which a traceback is looked for, and lines of it that are shown if there is none.
_TAIL_BYTES = 256 * 1024
_TAIL_LINES = 5

_EXAMPLES = """\
examples:
  lightwork run train.py                      a worker for each GPU, else for each core
  lightwork run -n 4 train.py --epochs 3      four workers; the rest is train.py's
  lightwork run -n 2 --set precision=bf16 train.py
  lightwork run -m package.train
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "run",
        help="start a team of workers on this host",
        description="Run SCRIPT on a team of workers of this host. Each holds the same model and takes other samples; "
        "the weights do not depend on how many there are. Only the main worker's output is shown.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-n",
        "--workers",
        default="auto",
        metavar="N",
        help="workers: a number, or auto (default): one for each GPU; where there is none, or with --set device=cpu, "
        "cores / threads",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the spec or the plan, over the script's",
    )
    parser.add_argument(
        "--transport",
        choices=get_args(Carriage),
        help="host: workers share one memory (default); group: each has its own, as if on a machine by itself",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        metavar="N",
        help="how often in succession another process takes the place of a worker that was killed; tries count anew "
        f"when one has lived for {LONG_ENOUGH:.0f} s (default: {RESTARTS}; 0: never, the others go on without it)",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="where traces and logs go (default: runs/1, runs/2, ...)")
    parser.add_argument(
        "--quiet", "--no-progress", action="store_true", help="no progress: the script's own output, and errors"
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's arguments")


_TRACEBACK = "Traceback (most recent call last)"

#: How Python announces that the next traceback belongs to the one before.
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)

#: How it announces one that did not end the process.
_ASIDE = ("Exception in thread", "Exception ignored in", "Error in atexit")


def carry_out(options: argparse.Namespace) -> int:
    """Start the team, wait for it, and return the exit status.

    Raises: UsageError or SpecError for arguments that make no sense.
    """
    settings = parse_settings(options.set)
    if options.restarts < 0:
        raise UsageError(f"--restarts {options.restarts} is not a number from 0 upwards.")
    if options.transport is not None:
        settings["transport"] = options.transport
    script = Script(target=options.script, arguments=tuple(options.arguments), is_module=options.is_module)
    _check_script(script)
    try:
        num_workers = count_workers(options.workers, settings)
        preload()
    except KeyboardInterrupt:
        _say("interrupted by SIGINT before the workers were started.")
        return 128 + signal.SIGINT
    run_dir = (Path(options.run_dir) if options.run_dir else create_run_dir(Path("runs"))).absolute()
    prepare_run_dir(run_dir)
    command = {"script": options.script, "is_module": options.is_module, "arguments": options.arguments}
    command |= {"folder": os.getcwd(), "settings": settings}
    write_records(run_dir, {"command": json.dumps(command, indent=2)})
    with noted_signals() as noted:
        return _begin_and_again(script, num_workers, run_dir, settings, options, noted)


def _begin_and_again(
    script: Script,
    num_workers: int,
    run_dir: Path,
    settings: dict[str, object],
    options: argparse.Namespace,
    noted: Sequence[int],
) -> int:
    """Start the team, and another one in its place as long as that is called for; return the exit status.

    `noted` are signals that come between two of them.
    """
    beginnings = Beginnings(run_dir, options.restarts)
    while True:
        logged = {rank: _size(log_of(run_dir, rank)) for rank in range(num_workers)}
        display = RunProgress(run_dir, num_workers, quiet=options.quiet, live=_is_drawable(), skip_existing=True)
        finished = False
        try:
            outcome = launch(
                script, num_workers, run_dir=run_dir, settings=settings, display=display, restarts=options.restarts
            )
            finished = outcome.culprit is None and outcome.interrupted is None
        except BrokenPipeError:
            return _conclude_unheard(run_dir)
        finally:
            display.close(finished=finished)
        follows = beginnings.follows(outcome)
        number = next(iter(noted), outcome.signalled)
        if follows and number is not None:
            follows, outcome = "", replace(outcome, interrupted=number, culprit=None)
        if not follows:
            status = _conclude(outcome, script, run_dir, display.last_step, logged)
            if beginnings.why_not:
                _say(beginnings.why_not)
            return status
        _say(follows)


def parse_settings(assignments: list[str]) -> dict[str, object]:
    """Return the settings that NAME=VALUE words make; a value is JSON if it can be, else the text itself."""
    settings: dict[str, object] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise SpecError(f"--set {assignment} is not NAME=VALUE. Write, for example, --set precision=bf16.")
        if name not in SETTABLE:
            raise SpecError(
                f"--set {name}=... names no field of the spec or the plan that can be set. They are "
                f"{', '.join(SETTABLE)}."
            )
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def count_workers(workers: str, settings: dict[str, object]) -> int:
    """Return the number of workers that -n asks for."""
    if workers == "auto":
        # Where the script will put its model is not known yet. Several workers on one GPU do no more than one, and
        # need its memory several times.
        is_asked = "device" in settings
        if settings.get("device", "cuda") == "cuda" and (num_gpus := max(count_gpus(), int(is_asked))):
            if not is_asked:
                _say(f"-n auto is {num_gpus}, as there are GPUs. For a script that uses none: -n N, --set device=cpu.")
            return num_gpus
        threads = settings.get("threads", 1)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return max(1, cores // threads) if isinstance(threads, int) and threads > 0 else cores
    if not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise UsageError(f"-n {workers} is not a number of workers from 1 to 1024. Write a number, or auto.")
    return int(workers)


def count_gpus() -> int:
    """Return the number of this host's GPUs, without waking them: workers are forked from this process."""
    import torch  # the launcher does later, too

    return int(torch.cuda.device_count())


def _check_script(script: Script) -> None:
    if script.is_module:
        sys.path.insert(0, os.getcwd())
        if not _is_module(script.target):
            raise UsageError(f"there is no module {script.target}. Give a script's path, or -m and a module's name.")
    elif not Path(script.target).is_file():
        raise UsageError(f"there is no script {script.target} in {os.getcwd()}. Give the path of a Python file.")


def _is_module(name: str) -> bool:
    """Return whether there is such a module, without importing its packages: they are the workers' to import."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:
        return False
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None


def _conclude(outcome: Outcome, script: Script, run_dir: Path, last_step: int, logged: dict[int, int]) -> int:
    """Say how a team ended that did not end well, and return the exit status.

    `logged` is the size in bytes that each log had before: an earlier run's traceback is not this one's.
    """
    if outcome.interrupted is not None:
        name = signal.Signals(outcome.interrupted).name
        where = f"after step {last_step}" if last_step >= 0 else "before the first step"
        if outcome.ended and all(ended.status == 0 for ended in outcome.ended):
            _say(f"interrupted by {name} {where}, and the script came to its end. Logs are in {run_dir / 'log'}.")
            return 0
        _say(f"interrupted by {name} {where}. All workers were ended; logs are in {run_dir / 'log'}.")
        return 128 + outcome.interrupted
    culprit = outcome.culprit
    if culprit is not None:
        _say(f"{culprit.describe_end()} The others were ended.")
        _show_last_words(outcome, culprit, run_dir, logged)
        return culprit.exit_status or 1
    if all(ended.progress is Progress.STARTED for ended in outcome.ended):
        copies = "It ran" if len(outcome.ended) == 1 else f"{len(outcome.ended)} copies of it ran, each for itself"
        _say(
            f"{script.target} ended without calling lightwork.distribute. {copies}. Call "
            "lightwork.distribute(model, optimizer, global_batch=...) and train in its steps."
        )
        return 1
    return 0


def _conclude_unheard(run_dir: Path) -> int:
    """Say that nobody reads the output any more (`lightwork run ... | head`), and return the exit status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # what is still in its buffer
    try:
        _say(f"the reader of the output has closed it. All workers were ended; logs are in {run_dir / 'log'}.")
    except BrokenPipeError:
        os.dup2(nowhere, sys.stderr.fileno())
    return 128 + signal.SIGPIPE


def _show_last_words(outcome: Outcome, culprit: Ended, run_dir: Path, logged: dict[int, int]) -> None:
    """Show the culprit's last words, unless a worker whose errors were shown as they came had the same."""

    def last_words(rank: int) -> str:
        log, start = log_of(run_dir, rank), logged.get(rank, 0)
        traceback = last_traceback(_tail(log, start))
        if traceback or culprit.status <= 0:
            return traceback
        return "\n".join(_tail(log, start).splitlines()[-_TAIL_LINES:])  # sys.exit("why"), a SyntaxError

    words = last_words(culprit.rank)
    was_shown = culprit.rank in outcome.shown or (
        words != "" and any(last_words(rank).endswith(words.splitlines()[-1]) for rank in outcome.shown)
    )
    if words and not was_shown:
        print(words, file=sys.stderr)
    _say(f"its log is {log_of(run_dir, culprit.rank)}")


def last_traceback(text: str) -> str:
    """Return the last traceback in a text, with those of its causes; empty if there is none.

    One of a thread, or of an exit handler, comes after the error that ended a worker: it counts only by itself.
    """
    found: list[str] = []
    aside: list[str] = []
    chained = False
    before = ""
    for part in _split(text):
        body = part.rstrip()
        end = body.rpartition("\n")[2]
        if end.startswith(_ASIDE):
            body = body.removesuffix(end).rstrip()
        if part.startswith(_TRACEBACK):
            into = aside if before.startswith(_ASIDE) else found
            if chained and into:
                into[-1] += "\n\n" + body
            else:
                into.append(body)
        chained = end in _CHAINED
        before = end
    return (found or aside or [""])[-1]


def _split(text: str) -> list[str]:
    """Cut a text before each traceback."""
    first, *rest = text.split(_TRACEBACK)
    return [first, *(_TRACEBACK + part for part in rest)]


def _tail(log: Path, start: int) -> str:
    """Return what a log holds after byte `start`, at most the last `_TAIL_BYTES`."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _is_drawable() -> bool:
    """Return whether standard error is a terminal whose cursor moves; FORCE_COLOR does not make a log file one."""
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


def _say(text: str) -> None:
    print(f"lightwork: {text}", file=sys.stderr, flush=True)
