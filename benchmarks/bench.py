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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from measure import BENCH_PID, Measurement

HERE = Path(__file__).resolve().parent
WARM_UP_STEPS = 3
RUN_SECONDS = 240  # a competitor that takes longer is ended, and said to have been
SIT_OUT = 1.25  # times the best peer's step in the first round, above which a peer sits out the others


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One program of a case. `micro_batch` is of the programs that have one."""

    name: str
    program: str = "peer"  #: peer, team (lightwork) or compute
    workers: int | None = None  #: None: as the case says
    batch: int | None = None
    micro_batch: int | None = None
    slowdown: float = 1.0
    settings: Sequence[str] = ()  #: of `lightwork run --set`


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a competitor gave."""

    step: float  #: seconds, median after the warm-up
    first_step: float  #: seconds from the launch to the end of the first step
    memory: float  #: bytes, all workers
    launcher: float  #: bytes
    loss: float  #: of the last step
    setting: str


Measure = Callable[[Run], float]
Round = dict[str, Run]  #: by competitor; those that failed or sat out are missing


def step_of(run: Run) -> float:
    return run.step


def memory_of(run: Run) -> float:
    return run.memory


def first_step_of(run: Run) -> float:
    return run.first_step


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A ratio, ours over theirs, and the bar that it has to meet."""

    text: str
    ours: str
    theirs: Sequence[str]  #: of several, the one that is best in what is compared, in that round
    bar: float
    measure: Measure = step_of
    at_least: bool = False

    def ratio(self, results: Round) -> float | None:
        """Return the ratio in one round, or None where either side is missing."""
        best = min((self.measure(results[name]) for name in self.theirs if name in results), default=0)
        return self.measure(results[self.ours]) / best if best and self.ours in results else None

    def holds(self, ratio: float) -> bool:
        """Return whether a ratio meets the bar, to the two decimals that the bar has."""
        return round(ratio, 2) >= self.bar if self.at_least else round(ratio, 2) <= self.bar


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, by whom, and what is claimed of it."""

    name: str
    model: str
    precision: str
    batch: int
    steps: int  #: timed, after the warm-up
    competitors: Sequence[Competitor]
    claims: Sequence[Claim] = ()
    workers: int = 2
    keep: Sequence[str] = ()  #: peers that never sit out, because a claim names them
    by_default: bool = True  #: run when no case is named


FP32_PEERS = ("ddp", "zero1", "fsdp2", "deepspeed")
BF16_DDP = ("ddp", "ddp-master", "ddp-master-pure")
BF16_PEERS = (*BF16_DDP, "zero1", "fsdp2", "deepspeed")
VARIANTS = (
    "ddp/fp32-all-reduce",
    "ddp/one-bucket",
    "ddp-master/one-bucket",
    "zero1/fp32-all-reduce",
    "fsdp2/reshard",
    "fsdp2/root",
    "deepspeed/torch-adam",
    "deepspeed/small-buckets",
    "deepspeed/reduce-scatter",
    "deepspeed/grad-norm",
)


def lightwork(
    micro_batch: int,
    *settings: str,
    name: str = "lightwork",
    workers: int | None = None,
    batch: int | None = None,
) -> Competitor:
    return Competitor(
        name=name, program="team", micro_batch=micro_batch, workers=workers, batch=batch, settings=settings
    )


def compute(micro_batch: int) -> Competitor:
    return Competitor(name="compute", program="compute", micro_batch=micro_batch)


def peers(names: Iterable[str]) -> list[Competitor]:
    return [Competitor(name=name) for name in names]


def against_best(bar: float, names: Sequence[str], *, ours: str = "lightwork") -> Claim:
    return Claim(text="step over the best peer's", ours=ours, theirs=names, bar=bar)


CASES = (
    Case(
        name="mid-bf16-2",
        model="mid",
        precision="bf16",
        batch=2,
        steps=20,
        competitors=[lightwork(1), compute(1), *peers(BF16_PEERS)],
        claims=[
            against_best(0.52, BF16_PEERS),
            Claim(text="step over compute alone", ours="lightwork", theirs=["compute"], bar=1.30),
            Claim(text="memory over DDP's", ours="lightwork", theirs=BF16_DDP, bar=0.52, measure=memory_of),
            Claim(
                text="launch to first step over DDP's",
                ours="lightwork",
                theirs=BF16_DDP,
                bar=0.65,
                measure=first_step_of,
            ),
        ],
        keep=BF16_DDP,
    ),
    Case(
        name="mid-bf16-16",
        model="mid",
        precision="bf16",
        batch=16,
        steps=10,
        competitors=[lightwork(8), lightwork(2, name="lightwork/micro-batch-2"), compute(8), *peers(BF16_PEERS)],
        claims=[
            against_best(0.77, BF16_PEERS),
            replace(
                against_best(0.83, BF16_PEERS, ours="lightwork/micro-batch-2"),
                text="step over the best peer's, micro-batch 2",
            ),
            Claim(text="step over compute alone", ours="lightwork", theirs=["compute"], bar=1.05),
            Claim(text="memory over DDP's", ours="lightwork", theirs=BF16_DDP, bar=0.57, measure=memory_of),
        ],
        keep=BF16_DDP,
    ),
    Case(
        name="mid-fp32-2",
        model="mid",
        precision="fp32",
        batch=2,
        steps=15,
        competitors=[lightwork(1), *peers(FP32_PEERS)],
        claims=[against_best(0.82, FP32_PEERS)],
    ),
    Case(
        name="mid-fp32-16",
        model="mid",
        precision="fp32",
        batch=16,
        steps=6,
        competitors=[lightwork(8), *peers(FP32_PEERS)],
        claims=[against_best(0.99, FP32_PEERS)],
    ),
    Case(
        name="gpt2-bf16-2",
        model="gpt2",
        precision="bf16",
        batch=2,
        steps=6,
        competitors=[lightwork(1), *peers(BF16_PEERS)],
        claims=[against_best(0.45, BF16_PEERS)],
    ),
    Case(
        name="gpt2-bf16-4",
        model="gpt2",
        precision="bf16",
        batch=4,
        steps=6,
        competitors=[lightwork(2), *peers(BF16_PEERS)],
        claims=[against_best(0.60, BF16_PEERS)],
    ),
    Case(
        name="weak-scaling",
        model="mid",
        precision="bf16",
        batch=16,
        steps=12,
        competitors=[lightwork(8, name="1 worker", workers=1, batch=8), lightwork(8, name="2 workers")],
        claims=[
            Claim(
                text="step of 1 worker over that of 2, each with 8 samples",
                ours="1 worker",
                theirs=["2 workers"],
                bar=0.98,
                at_least=True,
            )
        ],
    ),
    Case(
        name="tiny",
        model="tiny",
        precision="fp32",
        batch=64,
        steps=1000,
        competitors=[lightwork(32), *peers(FP32_PEERS)],
        claims=[against_best(0.30, FP32_PEERS)],
    ),
    Case(
        name="mid-bf16-4-of-4-workers",
        model="mid",
        precision="bf16",
        batch=4,
        steps=10,
        workers=4,
        competitors=[lightwork(1), *peers(BF16_DDP)],
        claims=[
            Claim(text="step over DDP's", ours="lightwork", theirs=BF16_DDP, bar=0.50),
            Claim(text="memory over DDP's", ours="lightwork", theirs=BF16_DDP, bar=0.40, measure=memory_of),
        ],
        keep=BF16_DDP,
    ),
    Case(
        name="slow-worker",
        model="mid",
        precision="bf16",
        batch=16,
        steps=10,
        competitors=[
            lightwork(2),
            replace(lightwork(2, name="rank 1 slowed 3 x"), slowdown=3.0),
        ],
        claims=[Claim(text="step over the undisturbed", ours="rank 1 slowed 3 x", theirs=["lightwork"], bar=1.60)],
    ),
    Case(
        name="group-fp32",
        model="mid",
        precision="fp32",
        batch=2,
        steps=12,
        competitors=[
            lightwork(1, "transport=group"),
            lightwork(1, "transport=group", "placement=zero1", name="lightwork/zero1"),
            lightwork(1, "transport=group", "placement=zero2", name="lightwork/zero2"),
            lightwork(1, "transport=group", "placement=zero3", name="lightwork/zero3"),
            *peers(("ddp", "zero1", "fsdp2", "fsdp2/reshard")),
        ],
        claims=[
            Claim(text="step over DDP's, replicated", ours="lightwork", theirs=["ddp"], bar=1.0),
            Claim(
                text="step over ZeroRedundancyOptimizer's, ZeRO-1", ours="lightwork/zero1", theirs=["zero1"], bar=1.0
            ),
            Claim(text="step over FSDP2's, ZeRO-2", ours="lightwork/zero2", theirs=["fsdp2"], bar=1.0),
            Claim(text="step over FSDP2's, ZeRO-3", ours="lightwork/zero3", theirs=["fsdp2/reshard"], bar=1.0),
        ],
        keep=("ddp", "zero1", "fsdp2", "fsdp2/reshard"),
    ),
    Case(
        name="group-bf16",
        model="mid",
        precision="bf16",
        batch=2,
        steps=15,
        competitors=[
            lightwork(1, "transport=group", "wire=bf16"),
            lightwork(1, "transport=group", "wire=bf16", "placement=zero1", name="lightwork/zero1"),
            lightwork(1, "transport=group", "wire=bf16", "placement=zero2", name="lightwork/zero2"),
            lightwork(1, "transport=group", "wire=bf16", "placement=zero3", name="lightwork/zero3"),
            *peers((*BF16_DDP, "zero1", "fsdp2", "fsdp2/reshard")),
        ],
        claims=[
            Claim(text="step over DDP's, replicated", ours="lightwork", theirs=BF16_DDP, bar=1.0),
            Claim(
                text="step over ZeroRedundancyOptimizer's, ZeRO-1", ours="lightwork/zero1", theirs=["zero1"], bar=1.0
            ),
            Claim(text="step over FSDP2's, ZeRO-2", ours="lightwork/zero2", theirs=["fsdp2"], bar=1.0),
            Claim(text="step over FSDP2's, ZeRO-3", ours="lightwork/zero3", theirs=["fsdp2/reshard"], bar=1.0),
        ],
        keep=(*BF16_DDP, "zero1", "fsdp2", "fsdp2/reshard"),
    ),
    Case(
        name="recompute",
        model="mid",
        precision="bf16",
        batch=16,
        steps=8,
        competitors=[lightwork(8), lightwork(8, "activations=recompute", name="recompute")],
        claims=[Claim(text="step over that which keeps activations", ours="recompute", theirs=["lightwork"], bar=1.35)],
    ),
    Case(
        name="peer-settings-2",
        model="mid",
        precision="bf16",
        batch=2,
        steps=20,
        competitors=peers([*BF16_PEERS, *VARIANTS]),
        keep=[*BF16_PEERS, *VARIANTS],
        by_default=False,
    ),
    Case(
        name="peer-settings-16",
        model="mid",
        precision="bf16",
        batch=16,
        steps=10,
        competitors=peers([*BF16_PEERS, *VARIANTS]),
        keep=[*BF16_PEERS, *VARIANTS],
        by_default=False,
    ),
)


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
