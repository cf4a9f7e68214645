"""A worker of `recovery.py`: DDP under torchrun with checkpoints, or a replica group of torchft. Kills itself once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import LEARNING_RATE, make_data, make_model

STEPS, DIES_IN, SAVES_EVERY = 40, 17, 10


class Log:
    """What this process did, in a file of its own, as lines of JSON."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"{os.getpid()}.jsonl").open("w", buffering=1)

    def write(self, **values: object) -> None:
        self._file.write(json.dumps({"at": time.monotonic(), **values}) + "\n")


def digest(model: nn.Module) -> str:
    """Return a hash of all weights."""
    found = hashlib.sha256()
    for value in model.parameters():
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()


def die(folder: Path, log: Log) -> None:
    """Kill this process, the first time that any comes here."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return
    log.write(killed=True)
    os.kill(os.getpid(), signal.SIGKILL)


def share(data: tuple[Tensor, ...], step: int, batch: int, part: int) -> list[Tensor]:
    """Return one half of the samples of a step."""
    half = batch // 2
    first = step * batch + part * half
    return [of[first : first + half] for of in data]


def ddp(name: str, batch: int, folder: Path, dies: bool) -> None:
    """Train by DDP; go on from the last checkpoint, if there is one."""
    # A store of this attempt's own: in that of all attempts it finds where the killed worker was, and fails.
    shared = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    rank = dist.get_rank()
    model = make_model(name)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=LEARNING_RATE, fused=True)
    data, log, saved, first = make_data(name, batch, STEPS), Log(folder), folder / "checkpoint.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, STEPS):
        loss = parallel(*share(data, step, batch, rank))
        if dies and rank == 1 and step == DIES_IN:
            die(folder, log)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.write(step=step)
        if step % SAVES_EVERY == SAVES_EVERY - 1:
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, folder / "fresh.pt")
                (folder / "fresh.pt").replace(saved)
            dist.barrier()
    log.write(digest=digest(model))
    dist.destroy_process_group()


def torchft(name: str, batch: int, folder: Path, dies: bool) -> None:
    """Train as one of two replica groups of torchft, each of one process."""
    from torchft import Manager, Optimizer, ProcessGroupGloo

    group = int(os.environ["REPLICA_GROUP_ID"])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1"}
    model = make_model(name)
    inner = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        replica_id=f"train_{group}",
        timeout=timedelta(seconds=10),
    )
    optimizer = Optimizer(manager, inner)
    parameters = list(model.parameters())
    data, log = make_data(name, batch, STEPS), Log(folder)
    while (step := manager.current_step()) < STEPS:
        optimizer.zero_grad()
        loss = model(*share(data, step, batch, group))
        if dies and group == 1 and step == DIES_IN:
            die(folder, log)
        loss.backward()
        # By hand: the hook of its DistributedDataParallel (0.2.0) fails an assertion in torch 2.13 when a group dies.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        manager.allreduce(flat).wait()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        optimizer.step()
        if manager.current_step() == step + 1:
            log.write(step=step, workers=manager.num_participants())
    log.write(digest=digest(model))
    manager.shutdown(wait=False)
    os._exit(0)


def lightwork(name: str, batch: int, folder: Path, dies: bool) -> None:
    """Train by lightwork, as one of two workers of `lightwork run`."""
    from torch.utils.data import TensorDataset

    import lightwork as lw

    model = make_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    more = json.loads(os.environ.get("RECOVERY_SETTINGS", "{}"))
    run = lw.distribute(model, optimizer, global_batch=batch, micro_batch=batch // 2, run_dir=folder / "run", **more)
    log = Log(folder)
    for step in run.steps(TensorDataset(*make_data(name, batch, STEPS)), shuffle=False):
        for part in step:
            loss = model(*part)
            if dies and run.rank == 1 and step.index == DIES_IN:
                die(folder, log)
            step.backward(loss)
        log.write(step=step.index)
    log.write(digest=run.digest())


if __name__ == "__main__":
    kind, name, batch, folder, dies = sys.argv[1:]
    torch.set_num_threads(1)
    {"ddp": ddp, "torchft": torchft, "lightwork": lightwork}[kind](name, int(batch), Path(folder), dies == "dies")
