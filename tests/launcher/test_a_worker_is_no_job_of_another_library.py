"""`lightwork run` makes no other library believe that it is in a job of torch.distributed; a worker knows its rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.command import environment, lightwork_run

JOINS = """
import torch
model = torch.nn.Linear(1, 1)
run = lightwork.distribute(model, torch.optim.SGD(model.parameters(), lr=1.0), global_batch=4)
assert (run.rank, run.world_size) == (lightwork.rank(), lightwork.world_size())
"""

SHOWS = (
    """\
import os, sys
import lightwork, torch.distributed as dist
known = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
assert not known, known
assert not dist.is_torchelastic_launched()
rank, size = lightwork.rank(), lightwork.world_size()
open(f"seen{rank}", "w").write(f"{rank} of {size}")
"""
    + JOINS
)


def test_a_worker_has_no_variables_of_torch_distributed_and_knows_its_rank(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, SHOWS, workers="3")
    assert result.status == 0, result.text
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(3)] == [f"{rank} of 3" for rank in range(3)]


def test_alone_it_is_rank_0_of_1(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHOWS)
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment(), check=True)
    assert (tmp_path / "seen0").read_text() == "0 of 1"


FIRST = (
    """\
import os, sys, time
import lightwork

def say(what):
    with open("log", "a") as log:
        log.write(what + "\\n")

with lightwork.first():
    if not os.path.exists("data"):
        say("download")
        time.sleep(0.5)
        open("data", "w").write("all of it")
    with lightwork.first():
        say("inner")
    assert open("data").read() == "all of it"
say("done")
"""
    + JOINS
)


@pytest.mark.parametrize("by", ["lightwork run", "torchrun", "python"])
def test_one_worker_goes_first_and_then_all_the_others(tmp_path: Path, by: str) -> None:
    if by == "lightwork run":
        result = lightwork_run(tmp_path, FIRST, workers="3")
        assert result.status == 0, result.text
    else:
        (tmp_path / "train.py").write_text(FIRST)
        started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"] if by == "torchrun" else []
        command = [sys.executable, *started, "train.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    num_workers = 1 if by == "python" else 3
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:2] == ["download", "inner"]
    assert sorted(lines) == sorted(["download", *["inner"] * num_workers, *["done"] * num_workers])


def test_where_the_first_one_fails_the_others_are_told_and_do_not_wait(tmp_path: Path) -> None:
    text = """\
import os, time, lightwork
try:
    with lightwork.first():
        raise OSError("no network")
except lightwork.RankFailed as error:
    open("writing", "w").write(str(error))
    os.rename("writing", "told")
    time.sleep(20)  # ended by the launcher
except OSError:
    while not os.path.exists("told"):
        time.sleep(0.01)
    raise
"""
    result = lightwork_run(tmp_path, text, workers="2")
    assert result.status != 0
    assert "no network" in result.err
    told = (tmp_path / "told").read_text()
    assert "rank 0 failed in it with OSError: no network" in told
