"""`distribute`: from a model, an optimizer and settings to a `Run`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightwork.checkpoint import folder as folders
from lightwork.checkpoint.checkpoint import Checkpoint
from lightwork.device.cuda import open_device
from lightwork.engine.assembly import attach, make_engine, make_parts
from lightwork.engine.engine import Engine
from lightwork.engine.parts import Workplace, take_from_first_host
from lightwork.errors import DamagedCheckpoint, LightworkError, SpecError
from lightwork.notice import notice
from lightwork.planner.fit import fit, offloaded
from lightwork.random import derive
from lightwork.run.exit import EXITS
from lightwork.run.folder import FOLDERS, Wanted, agree_on_folder, check_name, write_records
from lightwork.run.guard import refuse_parameters_of_others
from lightwork.run.run import Run
from lightwork.run.settle import check_arguments, settle
from lightwork.spec.holdings import Dials, Holdings, Tuning
from lightwork.spec.plan import Carriage, Place, Placement, Plan
from lightwork.spec.roster import FIRST_RANK
from lightwork.spec.spec import Activation, BufferRule, DeviceKind, Precision, Spec, StateFormat, Wire
from lightwork.state.description import Description, describe
from lightwork.state.optimizers import Optimizers
from lightwork.state.parameters import clear_gradients
from lightwork.store import heap
from lightwork.team import environment as environments
from lightwork.team import finding
from lightwork.team.environment import Environment, Launcher
from lightwork.team.join import Joined, Needs, find_roster, is_elastic, join
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team
from lightwork.trace import Trace
from lightwork.units import parse_bytes

#: Sizes that no user needs to choose.
TUNING = Tuning()


def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    device: DeviceKind | None = None,
    precision: Precision = "fp32",
    wire: Wire = "fp32",
    optimizer_state: StateFormat = "fp32",
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    clip_grad_adaptive: float | None = None,
    threads: int = 1,
    fp32_modules: tuple[str, ...] = (),
    buffers: Mapping[str, BufferRule] | None = None,
    transport: Carriage | None = None,
    placement: Placement | None = None,
    offload: Mapping[str, Place] | None = None,
    memory: str | None = None,
    activations: Activation | Mapping[str, Activation] | None = None,
    save_every: str | int | None = None,
    keep_checkpoints: int | None = None,
    noise: bool | None = None,
    weights: str | os.PathLike[str] | None = None,
    plan: Plan | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> Run:
    """Join the team that this process was started in, and return the run that trains `model` with it.

    The weights move into memory that all workers of the host share, as rank 0 has them; `model` and `optimizer` stay
    the objects that you know.

    Args:
        optimizer: one, or a list of several over disjoint parameters, such as Muon for matrices and AdamW for the rest.
            Its class takes the steps, parameter by parameter; one that can not be split so is refused.
        global_batch: samples an update.
        micro_batch: samples a forward and backward, a divisor of `global_batch`. Left out: an eighth of it, rounded up.
        seed: of the order of samples, their augmentation, and dropout.
        device: "cpu"; "cuda": a GPU for each worker, in turn where there are more workers; model, optimizer and batches
            are moved there, and work is deterministic in the whole process (torch.use_deterministic_algorithms);
            "rehearsal": what a worker with a GPU does, on a CPU, to try a plan. Left out: where the model is.
        precision: "fp32"; "bf16": bf16 weights and autocast for the computation, fp32 masters, sums and state; "fp16":
            the same in fp16, with dynamic loss scaling (slow on most CPUs). Copies of the model, such as an average of
            its weights, are narrow as well: average `run.state_dict()`, which is fp32.
        wire: of the partial sums of gradients. "bf16" halves their memory and traffic, and rounds every one.
        optimizer_state: "int8" keeps the moments of AdamW and other element-wise optimizers in 8 bits, a quarter.
        clip_grad_norm: the largest L2 norm of the whole gradient; None does not clip.
        clip_grad_value: the largest absolute value of an element of the gradient, in place of it.
        clip_grad_adaptive: in place of these, the largest length of the gradient of an output unit, as a part of the
            length of the unit's weights (adaptive clipping; 0.01 is usual).
        threads: torch's, for each worker. A part of the spec, because another number gives other bits.
        fp32_modules: names of modules whose weights stay fp32 under bf16 and fp16.
        buffers: how the values that micro-batches leave in a buffer become one, by the buffer's name: "mean", "sum",
            "first", "last", "maximum" or "minimum". Left out: the mean of floating ones, the sum of integer ones'
            increments.
        transport: "host": workers of a machine share memory, and machines are joined by sockets;
            "group": each worker has a memory of its own. Left out: as the plan says, which is "host" by default.
        placement: "replicate": every host holds everything; "zero1": masters and optimizer state are shared out
            among the hosts; "zero2": gradients too; "zero3": weights too, each brought from its owner when it is
            needed. (One host holds them once in any case.) Left out: as the plan says, "replicate" by default.
        offload: where "optimizer" (its state, and masters), "weights" and "gradients" lie: on the "host", or on "disk",
            in a file in the plan's `offload_dir`, of which a worker maps what it uses. For workers on CPUs "host" is
            where they are anyway; for one on a GPU they come to the GPU bucket by bucket, where all is computed.
            Left out: as the plan says, which is nothing by default.
        memory: the resident bytes that a worker may have, above a bare `import torch` and without its activations:
            "1GiB", "512MiB". What does not fit is offloaded to disk. On a GPU the bytes of its memory, activations
            included, and what does not fit goes to the host. Left out: as the plan says, no limit by default.
        activations: what forward leaves for backward, of all layers or by the name of a module: "keep" it,
            "recompute" it (the same bits, for about a third more compute), keep it in "int8" (other bits), or
            "offload" it from a device to host memory. Left out: as the plan says, which is "keep" by default.
        save_every: a checkpoint by itself, each "10min" (or "90s", "2h") or each so many steps, where the loop's body
            has ended. It is taken into memory, and written while training goes on; at once where memory is short, or
            `memory=` or `offload=` is given. One that can not be written is told of, and training goes on. Left out:
            as the plan says, which is none by default.
        keep_checkpoints: how many stay in the run directory: the last one, `checkpoint`, and those before it, by their
            steps. A run goes on from the newest that is sound. Left out: as the plan says, 2 by default.
        noise: estimate the noise scale of the gradients, in samples: about the batch beyond which more samples an
            update save few updates. In the trace and on the display; it changes no bit. Left out: as the plan says,
            which is no by default.
        weights: a safetensors file with the values that the model begins with, by the names of its state dict. A model
            built on torch.device("meta") needs it, or modules that all have `reset_parameters()`; it is given values
            one module after the other, where its weights lie.
        plan: what can not change a bit; its `world_size` is the launcher's business.
        run_dir: where traces and logs go: `runs/1`, `runs/2`, ... unless given. If it holds a checkpoint, the run
            goes on from there.
        resume: a checkpoint to go on from.
        name: where a script has several runs, such as the two of a GAN: the run has a folder of this name in the run
            directory, and random numbers of its own.

    Blocks: until every worker of the team has called.
    Raises: SpecError for settings that are impossible; Disagreement when the workers' scripts differ; MemoryFull.
    """
    optimizers, environment = check_arguments(model, optimizer), environments.read()
    check_name(name)
    EXITS.close_run_of(model)
    refuse_parameters_of_others(model, EXITS.models())
    arguments = {
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "seed": seed if name is None else derive(seed, "run", name),
        "device": device,
        "precision": precision,
        "wire": wire,
        "optimizer_state": optimizer_state,
        "clip_grad_norm": clip_grad_norm,
        "clip_grad_value": clip_grad_value,
        "clip_grad_adaptive": clip_grad_adaptive,
        "threads": threads,
        "fp32_modules": fp32_modules,
        "buffers": {} if buffers is None else buffers,
        "transport": transport,
        "placement": placement,
        "offload": offload,
        "memory": memory,
        "activations": activations,
        "save_every": save_every,
        "keep_checkpoints": keep_checkpoints,
        "noise": noise,
    }
    spec, plan = settle(model, optimizers, arguments, plan or Plan(), environment)
    torch.set_num_threads(spec.threads)
    if spec.device == "cuda":
        environments.make_cublas_deterministic()
    file = None if weights is None else Path(weights)
    description, holdings, plan, joined = _join_team(model, optimizers, spec, plan, file, environment)
    team = joined.team
    if environment.replays:
        run_dir = resume = None
    wanted = Wanted(run_dir=run_dir, launched=environment.run_dir, resume=resume, name=name)
    folder, candidates = _find_folder(team, wanted)
    trace = Trace(folder / "trace" / f"rank{team.rank}.jsonl" if plan.trace else None, notice)
    engine = _assemble(description, holdings, plan, joined, trace)
    run = Run(
        model=model,
        spec=spec,
        plan=plan,
        run_dir=folder,
        team=team,
        engine=engine,
        trace=trace,
    )
    trace.event("start", rank=team.rank, world_size=team.world_size, pid=os.getpid())
    if team.newcomer is None:
        _write_roster(team, folder, spec, plan)
        _say_hello(team, environment, spec, model)
    EXITS.add(run, team, engine.beside)
    team.report(Progress.JOINED)
    saved = _resume(run, team, candidates)
    FOLDERS.begin(folder, run.step_index, saved.description.beside if saved is not None else {}, EXITS.folders())
    heap.keep_pages()
    run.begin(elastic=holdings.dials.elastic)
    return run


def _join_team(
    model: nn.Module,
    optimizers: Optimizers,
    spec: Spec,
    plan: Plan,
    weights: Path | None,
    environment: Environment,
) -> tuple[Description, Holdings, Plan, Joined]:
    """Return what is trained, where it lies in the team's memory, the plan with what is offloaded, and the team."""
    device = open_device(spec.device, environment.local_rank)
    rendezvous = finding.find(environment)
    run_number = rendezvous.next_run()
    if run_number > 1:  # a newcomer is in by now
        environment = replace(environment, joins=False)
    roster = find_roster(environment, plan, rendezvous, run_number, has_own_memory=device.has_own_memory)
    try:
        description = describe(model, optimizers, spec, device, TUNING.cut_for(spec.device), weights)
        holdings = Holdings(
            layout=description.layout,
            spec=spec,
            roster=roster,
            host=roster.host_of(environment.rank),
            state=description.state_shape,
            dials=Dials(
                placement=plan.placement,
                offload=plan.offload,
                elastic=plan.elastic and is_elastic(roster, environment.launcher, device),
            ),
            depths=TUNING.depths,
        )
        if plan.audit_every and max(roster.sizes) == 1 < roster.world_size:
            raise SpecError(
                f"audit_every={plan.audit_every} compares workers that share a memory, and here each has its own. "
                "Leave it out; lightwork check compares whole runs."
            )
        if plan.memory is not None:
            plan = replace(plan, offload=fit(holdings, str(plan.memory), plan.offload))
            holdings = offloaded(holdings, plan.offload)
            device.limit(parse_bytes(str(plan.memory)))
    except LightworkError:
        rendezvous.report(Progress.JOINED)  # all workers are told the same, and nobody waits for this one
        raise
    flags = description.flag_bytes(holdings)
    needs = Needs(holdings=holdings, device=device, flags=flags, buffers=description.buffer_bytes)
    return description, holdings, plan, join(needs, plan, environment, rendezvous, run_number)


def _assemble(description: Description, holdings: Holdings, plan: Plan, joined: Joined, trace: Trace) -> Engine:
    """Return the engine, with the model in the team's memory as rank 0 has it."""
    team = joined.team
    leftover = clear_gradients(description.model)
    if leftover:
        team.say(
            f"{len(leftover)} parameters had gradients when lightwork.distribute was called ({', '.join(leftover[:3])}"
            f"{', ...' if len(leftover) > 3 else ''}). They were cleared, as optimizer.zero_grad() does."
        )
    workplace = Workplace(
        local_rank=team.local_rank,
        memory=joined.memory,
        board=team.board,
        signal=joined.signal,
        trace=trace,
        hosts=joined.hosts,
        weights_carrier=joined.weights_carrier,
    )
    parts = make_parts(description, holdings, workplace)
    leads = team.newcomer is None and team.is_leader
    if leads:
        attach(description, parts, write=True)
        take_from_first_host(parts)
    if team.newcomer is None:
        team.meet("distribute (weights)")
    if not leads:
        attach(description, parts, write=False)
    engine = make_engine(parts, joined.memory, plan.activations, noise=plan.noise)
    engine.audit_every = plan.audit_every
    if leads:
        engine.trained.release()
    return engine


def _find_folder(team: Team, wanted: Wanted) -> tuple[Path, list[Path]]:
    """Return the run directory and the checkpoints to go on from, the newest first; a newcomer goes on from none."""
    key = f"folder {len(EXITS.folders())}"
    if team.newcomer is not None:
        FOLDERS.note(wanted)
        return Path(team.rendezvous.wait_for_message(key)), []
    folder, candidates = agree_on_folder(team, wanted, EXITS.folders())
    if team.rank == FIRST_RANK and not EXITS.folders():
        team.rendezvous.publish(key, str(folder))
    return folder, candidates


def _resume(run: Run, team: Team, candidates: Sequence[Path]) -> Checkpoint | None:
    """Go on from the first of these checkpoints that is sound, and return it; nothing happens without any."""
    for path in candidates:
        try:
            saved = run.load(path)
        except DamagedCheckpoint as error:
            if path == candidates[-1]:
                raise
            if team.is_main and path == candidates[0]:  # the next save takes its place
                folders.put_aside(path)
            team.say(f"{error} The one before it is tried.")
            continue
        team.say(f"resumed after {run.step_index} steps, from {path}.")
        return saved
    return None


def _write_roster(team: Team, folder: Path, spec: Spec, plan: Plan) -> None:
    own = json.dumps([socket.gethostname(), os.getpid()]).encode()
    names, pids = zip(*map(json.loads, team.meet("distribute (roster)", own)), strict=True)
    if team.is_main:
        roster = team.roster.to_json(names, pids)
        write_records(folder, {"spec": spec.to_json(), "plan": plan.to_json(), "roster": roster})


def _say_hello(team: Team, environment: Environment, spec: Spec, model: nn.Module) -> None:
    if environment.launcher is Launcher.PYTHON and sys.argv[0].endswith(".py"):
        team.say(f"a team of one. For a larger one: lightwork run -n {os.cpu_count() or 2} {' '.join(sys.argv)}")
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if norms and spec.num_micro_batches > 1:
        team.say(
            f"batch normalisation ({', '.join(norms[:3])}{', ...' if len(norms) > 3 else ''}) takes its statistics of "
            f"the {spec.micro_batch} samples of a micro-batch, not of the {spec.global_batch} of an update. A larger "
            "micro_batch= changes that."
        )
    surplus = team.world_size - spec.num_micro_batches
    if surplus > 0:
        names = (
            f"rank {spec.num_micro_batches}"
            if surplus == 1
            else f"ranks {spec.num_micro_batches} to {team.world_size - 1}"
        )
        team.say(
            f"{team.world_size} workers for {spec.num_micro_batches} micro-batches an update: "
            f"{surplus} idle (they help with the "
            f"update, and take over from late workers). {names}. A smaller micro_batch employs them."
        )
    is_shown = team.is_main or environment.launcher in (Launcher.PYTHON, Launcher.LIGHTWORK)
    if not is_shown and not (isinstance(sys.stdout, TextIOWrapper) and sys.stdout.name == os.devnull):
        # Only the main worker's output is shown; `lightwork run` sees to it by itself.
        sys.stdout.flush()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
