"""Time lightwork and its peers in one run, and write what each claim comes to.

    python benchmarks/bench.py                                  # everything, about three quarters of an hour
    python benchmarks/bench.py --only mid-bf16-2,tiny --rounds 5

A case is a model, a precision, a global batch and the competitors that train it. It runs in rounds: each round starts
every competitor once, in an order that rotates, because a machine's speed drifts within the hour. A claim is a ratio
within a round; the median over rounds is reported, with the range. Peers that were clearly slower than the best in
the first round sit out the others.

Order: run the rounds of a case, print and write its table, go on; at the end print and write the summary of claims.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cases import CASES, Case, Claim, Competitor, Round, Run
from measure import BENCH_PID, Measurement

HERE = Path(__file__).resolve().parent
WARM_UP_STEPS = 3
RUN_SECONDS = 240  # a competitor that takes longer is ended, and said to have been
SIT_OUT = 1.25  # times the best peer's step in the first round, above which a peer sits out the others

# --- one run ----------------------------------------------------------------------------------------------------------


def command_of(case: Case, competitor: Competitor, steps: int, out: Path) -> list[str]:
    """Return the command line that a user would type, with this interpreter's programs."""
    workers = competitor.workers or case.workers
    arguments = [
        *("--model", case.model),
        *("--precision", case.precision),
        *("--batch", str(competitor.batch or case.batch)),
        *("--steps", str(steps)),
        *("--out", str(out)),
    ]
    if competitor.micro_batch is not None:
        arguments += ["--micro-batch", str(competitor.micro_batch)]
    if competitor.program == "team":
        arguments += ["--slowdown", str(competitor.slowdown)]
        settings = [part for setting in competitor.settings for part in ("--set", setting)]
        return [program("lightwork"), "run", "-n", str(workers), *settings, str(HERE / "team.py"), *arguments]
    if competitor.program == "peer":
        arguments += ["--peer", competitor.name]
    script = str(HERE / f"{competitor.program}.py")
    port = str(29500 + os.getpid() % 10_000)
    return [program("torchrun"), "--nproc-per-node", str(workers), "--master-port", port, script, *arguments]


def program(name: str) -> str:
    """Return the path of a command that is installed beside this interpreter."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else (shutil.which(name) or name)


def run_competitor(case: Case, competitor: Competitor, steps: int) -> Run | str:
    """Run a competitor once; return what it measured, or why it did not."""
    if competitor.name.startswith("deepspeed") and find_spec("deepspeed") is None:
        return "not installed: pip install -r benchmarks/requirements.txt"
    with tempfile.TemporaryDirectory(prefix="lightwork-bench-") as folder:
        out = Path(folder)
        log = out / "log"
        command = command_of(case, competitor, WARM_UP_STEPS + steps, out)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where DeepSpeed looks for ninja
        environment = os.environ | {"OMP_NUM_THREADS": "1", BENCH_PID: str(os.getpid()), "PATH": path}
        start = time.time()
        try:
            with log.open("w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, cwd=out, env=environment)
        except OSError as error:
            return f"not started: {error}"
        try:
            status = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return f"ended after {RUN_SECONDS} s"
        finally:
            end_tree(process)
        result = out / "result.json"
        if status or not result.exists():
            return f"exit status {status}: {last_error(log)}"
        measured = Measurement(**json.loads(result.read_text()))
    return Run(
        step=statistics.median(measured.step_seconds[WARM_UP_STEPS - 1 :]),
        first_step=measured.first_step_at - start,
        memory=measured.workers_bytes,
        launcher=measured.launcher_bytes,
        loss=measured.losses[-1],
        setting=measured.setting,
    )


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started: torchrun's workers are in sessions of their own."""
    try:
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for each in tree:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception|Failed)\b.*:", line)]
    return (errors or lines or ["no output"])[0][:200]


# --- rounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All rounds of a case."""

    case: Case
    steps: int
    rounds: Sequence[Round]
    failures: dict[str, str]

    def runs(self, name: str) -> list[Run]:
        """Return a competitor's runs."""
        return [results[name] for results in self.rounds if name in results]

    def ratios(self, claim: Claim) -> list[float]:
        """Return a claim's ratio in each round that has both sides."""
        ratios = (claim.ratio(results) for results in self.rounds)
        return [ratio for ratio in ratios if ratio is not None]


def run_case(case: Case, *, num_rounds: int, steps: int, console: Console) -> Outcome:
    """Run the rounds of a case."""
    rounds: list[Round] = []
    failures: dict[str, str] = {}
    field = list(case.competitors)
    for index in range(num_rounds):
        turn = index * len(field) // num_rounds
        results: Round = {}
        for competitor in [*field[turn:], *field[:turn]]:
            console.print(f"[dim]{case.name}, round {index + 1} of {num_rounds}: {competitor.name}[/dim]")
            outcome = run_competitor(case, competitor, steps)
            if isinstance(outcome, Run):
                results[competitor.name] = outcome
            else:
                failures[competitor.name] = outcome
                console.print(f"[red]{competitor.name}: {escape(outcome)}[/red]")
        rounds.append(results)
        if index == 0:
            field = [each for each in field if stays(each, case, results)]
    return Outcome(case=case, steps=steps, rounds=rounds, failures=failures)


def stays(competitor: Competitor, case: Case, first: Round) -> bool:
    """Return whether a competitor runs in the rounds after the first."""
    if competitor.name not in first:
        return find_spec("deepspeed") is not None or not competitor.name.startswith("deepspeed")
    if competitor.program != "peer" or competitor.name in case.keep:
        return True
    best = min(run.step for name, run in first.items() if is_peer(case, name))
    return first[competitor.name].step <= SIT_OUT * best


def is_peer(case: Case, name: str) -> bool:
    return any(each.name == name and each.program == "peer" for each in case.competitors)


# --- tables -----------------------------------------------------------------------------------------------------------

CLAIM_HEADS = ("case", "claim", "bar", "median", "range", "rounds", "")
RUN_HEADS = ("competitor", "step", "range", "first step", "memory", "launcher", "loss", "rounds", "settings")
Rows = list[tuple[str, ...]]


def claim_rows(outcome: Outcome) -> Rows:
    rows: Rows = []
    for claim in outcome.case.claims:
        ratios = outcome.ratios(claim)
        bar = f"{'>=' if claim.at_least else '<='} {claim.bar:.2f}"
        if ratios:
            median = statistics.median(ratios)
            span = f"{min(ratios):.2f}-{max(ratios):.2f}"
            verdict = "met" if claim.holds(median) else "missed"
            rows.append((outcome.case.name, claim.text, bar, f"{median:.2f}", span, str(len(ratios)), verdict))
        else:
            rows.append((outcome.case.name, claim.text, bar, "-", "-", "0", "not measured"))
    return rows


def run_rows(outcome: Outcome) -> Rows:
    rows: Rows = []
    for competitor in outcome.case.competitors:
        runs = outcome.runs(competitor.name)
        failure = outcome.failures.get(competitor.name, "")
        if not runs:
            rows.append((competitor.name, *["-"] * 6, "0", failure))
            continue
        steps = [run.step for run in runs]
        rows.append(
            (
                competitor.name,
                milliseconds(statistics.median(steps)),
                f"{milliseconds(min(steps))}-{milliseconds(max(steps))}",
                f"{statistics.median(run.first_step for run in runs):.1f}",
                f"{statistics.median(run.memory for run in runs) / 1e6:.0f}",
                f"{statistics.median(run.launcher for run in runs) / 1e6:.0f}",
                f"{runs[-1].loss:.4f}",
                str(len(runs)),
                runs[-1].setting + (f"; one run failed: {failure}" if failure else ""),
            )
        )
    return rows


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.0f}"


def print_table(console: Console, title: str, heads: Sequence[str], rows: Rows) -> None:
    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        style = {"met": "green", "missed": "red"}.get(row[-1])
        table.add_row(*(escape(cell) for cell in row), style=style)
    console.print(table)


def markdown(heads: Sequence[str], rows: Rows) -> str:
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def case_page(outcome: Outcome, preamble: str) -> str:
    case = outcome.case
    how = (
        f"{case.model}, {case.precision}, global batch {case.batch}, {case.workers} workers of 1 thread; "
        f"{WARM_UP_STEPS} steps to warm up, then {outcome.steps} timed."
    )
    legend = (
        "Step: ms, median over rounds of each run's median, and the range. First step: seconds from the launch to its "
        "end. Memory: MB, proportional set size of all workers after the last step; the launcher's beside it. Loss: of "
        f"the last step. A peer above {SIT_OUT:g} x the best in the first round sits out the others."
    )
    parts = [f"# {case.name}\n", how + "\n", preamble]
    if case.claims:
        parts.append(markdown(CLAIM_HEADS, claim_rows(outcome)))
    parts += [markdown(RUN_HEADS, run_rows(outcome)), legend + "\n"]
    return "\n".join(parts)


# --- the machine ------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Return a short name of this machine, such as `epyc-2core`."""
    words = re.sub(r"\(.*?\)|@.*", " ", cpu_name().lower()).split()
    noise = {"amd", "intel", "cpu", "processor", "with"}
    kept = [word for word in words if word not in noise and not re.fullmatch(r"\d+-core", word)]
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(kept)).strip("-") or platform.machine()
    return f"{slug}-{num_cores()}core"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preamble() -> str:
    packages = []
    for name in ("lightwork", "torch", "deepspeed"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    software = f"Python {platform.python_version()}, {', '.join(packages)}"
    return f"{cpu_name()}, {num_cores()} cores; {software}; {when}, {load}.\n"


# --- the command ------------------------------------------------------------------------------------------------------


def choose_cases(only: str | None) -> list[Case]:
    if only is None:
        return [case for case in CASES if case.by_default]
    by_name = {case.name: case for case in CASES}
    names = only.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"--only names {', '.join(unknown)}. The cases are {', '.join(by_name)}.")
    return [by_name[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time lightwork and its peers; see the top of this file.")
    parser.add_argument("--only", metavar="CASE,...", help=", ".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed steps a run, for a quick look")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder of the results")
    arguments = parser.parse_args()
    cases = choose_cases(arguments.only)
    if arguments.rounds < 1 or (arguments.steps is not None and arguments.steps < 1):
        raise SystemExit("--rounds and --steps are whole numbers from 1 upwards.")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the competitor in hand is ended too
    console = Console(width=None if sys.stdout.isatty() else 200)
    arguments.out.mkdir(parents=True, exist_ok=True)
    suffix = f"{machine()}_{datetime.now():%Y%m}.md"
    claims: Rows = []
    for case in cases:
        steps = arguments.steps or case.steps
        outcome = run_case(case, num_rounds=arguments.rounds, steps=steps, console=console)
        print_table(console, case.name, RUN_HEADS, run_rows(outcome))
        (arguments.out / f"{case.name}_{suffix}").write_text(case_page(outcome, preamble()))
        claims += claim_rows(outcome)
    print_table(console, "claims", CLAIM_HEADS, claims)
    if arguments.only is None:
        page = f"# Claims\n\n{preamble()}\n{markdown(CLAIM_HEADS, claims)}"
        (arguments.out / f"summary_{suffix}").write_text(page)
    console.print(f"Written to {arguments.out}.")


if __name__ == "__main__":
    main()
