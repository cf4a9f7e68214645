"""Where a worker finds its team: the environment variables of whoever started it.

`lightwork run`, torchrun, Slurm's srun and MPI's mpirun each leave a rank and a world size behind; a plain
`python train.py` leaves nothing and is a team of one. Nothing else reads from `os.environ` who this process is. (The
launcher writes there what `read` will find in a worker, as `variables` says.)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from lightwork.errors import SpecError

#: Set for the workers of a team that replays: see `Environment.replays`.
_REPLAY = "LIGHTWORK_REPLAY"


class Launcher(Enum):
    """Who started this process."""

    PYTHON = "python"  #: nobody: a team of one
    LIGHTWORK = "lightwork run"  #: our own launcher, which forked us
    TORCHRUN = "torchrun"
    SLURM = "srun"
    MPI = "mpirun"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A worker's place in its team."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: Launcher = Launcher.PYTHON
    rendezvous_fd: int | None = None  #: inherited from `lightwork run`
    address: str | None = None  #: host of the rendezvous store, where others started us
    port: int | None = None
    store_is_served: bool = False  #: by torchrun's agent
    interface: str | None = None  #: the network between hosts, as Gloo and other libraries are told it
    token: str = field(default="", repr=False)  #: what the workers of several hosts prove to each other that they know
    machine: str = ""  #: an identity of the memory that workers can share
    job: str = ""  #: what the launcher calls the job, so that two on one machine do not meet
    attempt: str = "0"  #: of torchrun, which starts all workers anew after a failure
    run_dir: str | None = None
    joins: bool = False  #: a team that trains, at the place of a worker that has died
    replays: bool = False  #: it trains what was trained before, in `run_dir`, whatever the script says
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)  #: `--set NAME=VALUE`, parsed

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size or self.joins):
            raise SpecError(
                f"rank {self.rank} does not fit a team of {self.world_size} (from the variables of "
                f"{self.launcher.value}). Ranks go from 0 to {self.world_size - 1}."
            )

    def variables(self) -> dict[str, str]:
        """Return the variables from which `read` makes this value again, in this process (`lightwork run` only)."""
        variables = {
            # Not RANK and WORLD_SIZE, from which other libraries conclude that there is a job of torch.distributed.
            "LIGHTWORK_RANK": str(self.rank),  # on this host as well: its teams are on one
            "LIGHTWORK_WORLD_SIZE": str(self.world_size),
            "LIGHTWORK_SETTINGS": json.dumps(dict(self.settings)),
            "LIGHTWORK_PID": str(os.getpid()),
        }
        if self.rendezvous_fd is not None:
            variables["LIGHTWORK_RENDEZVOUS_FD"] = str(self.rendezvous_fd)
        if self.run_dir is not None:
            variables["LIGHTWORK_RUN_DIR"] = self.run_dir
        if self.joins:
            variables["LIGHTWORK_JOINS"] = "1"
        return variables


def environment_of_replay() -> dict[str, str]:
    """Return the variables with which `lightwork run` is started for a team that replays, and belongs to no other."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTWORK_")}
    return {**own, _REPLAY: "1"}


def make_cublas_deterministic() -> None:
    """Set what cuBLAS reads when it is first used; without it, products may differ from one call to the next."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _number(variables: Mapping[str, str], *names: str, default: int | None = None) -> int | None:
    for name in names:
        if name in variables:
            try:
                return int(variables[name])
            except ValueError:
                raise SpecError(f"{name}={variables[name]!r} is not a number. Unset it, or use a launcher.") from None
    return default


def read(variables: Mapping[str, str] | None = None) -> Environment:
    """Return the place in its team that `variables` (default: `os.environ`) give this process.

    Raises: SpecError when they contradict themselves.
    """
    env = _own(os.environ if variables is None else variables)
    common = Environment(
        interface=env.get("GLOO_SOCKET_IFNAME"),
        token=env.get("LIGHTWORK_TOKEN", ""),
        machine=_machine(env),
        run_dir=env.get("LIGHTWORK_RUN_DIR"),
        joins="LIGHTWORK_JOINS" in env,
        replays=_REPLAY in env,
        settings=json.loads(env.get("LIGHTWORK_SETTINGS", "{}")),
        address=env.get("MASTER_ADDR"),
        port=_number(env, "MASTER_PORT"),
        store_is_served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job=_job(env),
        attempt=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    if "LIGHTWORK_RENDEZVOUS_FD" in env:
        launcher = Launcher.LIGHTWORK
        rank, size = _number(env, "LIGHTWORK_RANK"), _number(env, "LIGHTWORK_WORLD_SIZE")
    elif "RANK" in env and "WORLD_SIZE" in env:
        launcher, rank, size = Launcher.TORCHRUN, _number(env, "RANK"), _number(env, "WORLD_SIZE")
    elif "OMPI_COMM_WORLD_RANK" in env or "PMI_RANK" in env:
        launcher = Launcher.MPI
        rank = _number(env, "OMPI_COMM_WORLD_RANK", "PMI_RANK")
        size = _number(env, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        launcher, rank, size = (
            Launcher.SLURM,
            _number(env, "SLURM_PROCID"),
            _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        )
    else:
        return common
    if rank is None or size is None:
        raise SpecError(f"{launcher.value} left a rank ({rank}) without a world size ({size}), or the reverse.")
    return replace(
        common,
        launcher=launcher,
        rank=rank,
        world_size=size,
        local_rank=rank if launcher is Launcher.LIGHTWORK else _local_rank(env, rank),
        rendezvous_fd=_number(env, "LIGHTWORK_RENDEZVOUS_FD"),
        port=common.port if common.port is not None else _port_of_job(common.job, launcher),
        address=common.address or "127.0.0.1",
    )


def _local_rank(env: Mapping[str, str], rank: int) -> int:
    return _number(env, "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", default=rank) or 0


def _machine(env: Mapping[str, str]) -> str:
    """Return what tells apart the machines, containers and launcher's nodes whose processes can not share memory."""
    node = next((env[name] for name in ("GROUP_RANK", "SLURM_NODEID") if name in env), "")
    boot = ""
    with contextlib.suppress(OSError):
        boot = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{socket.gethostname()} {boot} {node}".strip()


def _own(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables that are meant for this process: not those of a worker of `lightwork run` that started it.

    A script that a worker starts inherits the worker's rank, but not its descriptors: it is no member of that team.
    """
    if "LIGHTWORK_RENDEZVOUS_FD" not in env or env.get("LIGHTWORK_PID") == str(os.getpid()):
        return env
    return {name: value for name, value in env.items() if not name.startswith("LIGHTWORK_")}


def _job(env: Mapping[str, str]) -> str:
    """Return what the launcher calls the job; empty where it does not say."""
    if "SLURM_STEP_ID" in env and "OMPI_COMM_WORLD_RANK" not in env:
        return f"{env.get('SLURM_JOB_ID', '0')}.{env['SLURM_STEP_ID']}"
    names = ("TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
    return next((env[name] for name in names if env.get(name)), "")


def _port_of_job(job: str, launcher: Launcher) -> int | None:
    """Return a port that all tasks of one job agree on without talking: its identifier, folded into a range.

    None without one: two jobs of a machine would meet.
    """
    if launcher not in (Launcher.SLURM, Launcher.MPI) or not job:
        return None
    return 20_000 + zlib.crc32(job.encode()) % 30_000
