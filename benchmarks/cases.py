"""What `bench.py` times: the cases, who competes in each, and what is claimed of it. Data; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace


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
