"""`lightwork run` on scripts that fail, workers that die, and users who lose patience: a message, and nothing left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from lightwork.cli.main import main
from tests.launcher.command import (
    HEAD,
    LOOP,
    finish,
    left_running,
    lightwork_run,
    pids_of,
    script,
    start,
    wait_until,
)

MARK = "Traceback (most recent call last)"


def test_an_exception_in_one_worker_is_shown_once_and_ends_the_others_at_once(tmp_path: Path) -> None:
    # The other one trains on for a minute, with a loading child, if nobody ends it.
    text = script(
        'if run.rank == 1 and step.index >= 2: print("the end is near"); raise KeyError("kaboom")\n'
        "        time.sleep(0.05)",
        max_steps=150,
    ).replace("run.steps(dataset,", "run.steps(torch.utils.data.DataLoader(dataset, num_workers=1),")
    (tmp_path / "train.py").write_text(text)
    process = start(tmp_path, "-m", "lightwork", "run", "-n", "3", "train.py")
    run_dir = tmp_path / "runs" / "1"
    trace = run_dir / "trace" / "rank0.jsonl"
    wait_until(lambda: trace.exists() and '"name": "steps"' in trace.read_text())
    everything = group_members(pids_of(run_dir))
    result = finish(process, run_dir)
    assert result.status == 1, result.text
    assert result.err.count(MARK) == 1, result.text
    assert result.err.count("KeyError: 'kaboom'") == 1
    assert re.search(r'File ".*train\.py", line \d+, in <module>', result.err)
    assert "runpy" not in result.err, "the traceback begins in the script"
    assert re.search(
        rf"rank 1 \(pid {result.pids()[1]}\) failed with exit status 1 in the middle of training\.", result.err
    )
    assert f"its log is {run_dir / 'log' / 'rank1.log'}" in result.err
    assert "the end is near" in result.log(1)
    assert left_running([*result.pids(), *everything]) == []


def group_members(leaders: list[int]) -> list[int]:
    """Return the processes of the groups that `leaders` lead."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                group = int((entry / "stat").read_text().rpartition(")")[2].split()[2])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if group in leaders:
                members.append(int(entry.name))
    return members


@pytest.mark.parametrize("place", ["before distribute", "in the loop"])
def test_an_exception_that_every_worker_raises_is_shown_once(tmp_path: Path, place: str) -> None:
    mischief = 'raise ValueError("all of us")'
    text = HEAD + mischief + "\n" if place == "before distribute" else script(f"if step.index >= 1: {mischief}")
    result = lightwork_run(tmp_path, text, workers="3")
    assert result.status == 1, result.text
    assert result.err.count(MARK) == 1, result.text
    assert result.err.count("ValueError: all of us") == 1, result.text
    assert len(re.findall(r"rank \d \(pid \d+\) failed with exit status 1", result.err)) == 1
    assert left_running(result.pids() if place == "in the loop" else []) == []


def test_a_traceback_that_another_ones_failure_cuts_short_is_shown_whole(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
def slow(kind, error, trace):
    print("the first half", file=sys.stderr, flush=True)
    time.sleep(1)
    print("the second half", file=sys.stderr, flush=True)


if os.environ["LIGHTWORK_RANK"] == "0":
    sys.excepthook = slow
raise ValueError("all of us")
"""
    )
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert result.err.count("the first half") == result.err.count("the second half") == 1, result.text


@pytest.mark.parametrize(
    ("mischief", "status", "words"),
    [
        ("sys.exit(0)", 1, "exited with status 0 in the middle of training, while others need it"),
        ("os._exit(0)", 1, "exited with status 0 in the middle of training, while others need it"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL in the middle of training"),
    ],
)
def test_a_worker_that_leaves_in_mid_run_is_named(tmp_path: Path, mischief: str, status: int, words: str) -> None:
    text = script(f"if run.rank == 1 and step.index >= 3: {mischief}", max_steps=100_000)
    result = lightwork_run(tmp_path, text, "--set", "elastic=false")
    assert result.status == status, result.text
    assert f"lightwork: rank 1 (pid {result.pids()[1]}) {words}" in result.err, result.text
    assert MARK not in result.err, result.text
    assert left_running(result.pids()) == []


def test_a_worker_that_ends_before_distribute_is_named(tmp_path: Path) -> None:
    text = (
        HEAD
        + 'if os.environ["LIGHTWORK_RANK"] == "1": sys.exit(0)\n'
        + LOOP.replace("AT", "pass").replace("MAX_STEPS", "6")
    )
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert "exited with status 0 before it called lightwork.distribute, while others need it" in result.err


def test_interrupting_the_launcher_ends_everything_with_a_message(tmp_path: Path) -> None:
    # The first time the script is asked, the second time the workers, of whom one does not listen; then nobody is.
    text = script(
        "if run.rank == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        if step.index >= 3:\n"
        '            time.sleep(0.6); print("in step 3", flush=True); time.sleep(60)',
        max_steps=100,
    )
    (tmp_path / "train.py").write_text(text)
    process = start(tmp_path, "-m", "lightwork", "run", "-n", "2", "train.py")
    run_dir = tmp_path / "runs" / "1"
    assert process.stdout is not None
    assert process.stdout.readline() == "in step 3\n"
    pids = pids_of(run_dir)
    os.kill(process.pid, signal.SIGINT)
    assert left_running(pids, seconds=0.5) == pids
    os.kill(process.pid, signal.SIGINT)
    assert left_running([pids[0]]) == []
    assert left_running([pids[1]], seconds=0.0) == [pids[1]]
    os.kill(process.pid, signal.SIGINT)
    result = finish(process, run_dir)
    assert result.status == 130, result.text
    assert "lightwork: interrupted by SIGINT after step 2. All workers were ended" in result.err, result.text
    assert MARK not in result.err, result.text
    assert left_running([*pids, process.pid]) == []


def test_the_workers_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(script('print("alive", flush=True); time.sleep(60)'))
    process = start(tmp_path, "-m", "lightwork", "run", "-n", "2", "train.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    pids = pids_of(tmp_path / "runs" / "1")
    process.kill()
    process.communicate()
    assert left_running(pids) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: VERB"),
        (["run"], "required: SCRIPT"),
        (["run", "nothing.py"], "there is no script nothing.py in"),
        (["run", "-m", "no_such_package.train"], "there is no module no_such_package.train"),
        (["run", "-n", "0", "train.py"], "-n 0 is not a number of workers from 1 to 1024"),
        (["run", "-n", "two", "train.py"], "-n two is not a number of workers"),
        (["run", "-n", "-2", "train.py"], "-n"),
        (["run", "--set", "precision", "train.py"], "--set precision is not NAME=VALUE"),
        (["run", "--set", "colour=red", "train.py"], "--set colour=... names no field of the spec or the plan"),
        (["run", "--set", "world_size=3", "train.py"], "--set world_size=... names no field"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    message = capsys.readouterr().err
    assert words in message
    assert MARK not in message
    assert not (tmp_path / "runs").exists(), "a wrong command leaves nothing"


def test_a_value_that_the_spec_refuses_is_explained_by_the_script(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, script(), "--set", "precision=fp8")
    assert result.status == 1, result.text
    assert "SpecError: precision='fp8' is not known. Choose one of fp32, bf16" in result.err
    assert result.err.count(MARK) == 1


SECOND = """\
class Leaves(torch.optim.SGD):
    def step(self, closure=None):
        if os.environ["LIGHTWORK_RANK"] == "LEAVER":
            sys.exit(0)
        return super().step(closure)

second = torch.nn.Linear(6, 3)
BEFORE
lightwork.distribute(second, Leaves(second.parameters()), global_batch=16)
"""


@pytest.mark.parametrize("leaver", ["0", "1"])
@pytest.mark.parametrize(
    ("before", "where"), [("", "in lightwork.distribute"), ("leave", "after a loop over run.steps")]
)
def test_an_end_with_0_in_a_further_distribute_or_before_it_is_a_failure(
    tmp_path: Path, leaver: str, before: str, where: str
) -> None:
    text = SECOND.replace("LEAVER", leaver)
    text = text.replace("BEFORE", f"if os.environ['LIGHTWORK_RANK'] == '{leaver}': sys.exit(0)" if before else "")
    start = time.monotonic()
    result = lightwork_run(tmp_path, script(end=text))
    assert time.monotonic() - start < 30
    assert result.status == 1, result.text
    assert f"rank {leaver} (pid {result.pids()[int(leaver)]}) exited with status 0 {where}, while others" in result.err


def test_a_further_distribute_that_refuses_all_workers_alike_is_the_script_s_business(tmp_path: Path) -> None:
    text = """\
second = torch.nn.Linear(6, 3)
try:
    lightwork.distribute(second, torch.optim.SGD(second.parameters()), global_batch=16, memory="1KiB")
except lightwork.MemoryFull:
    print("it does not fit")
"""
    result = lightwork_run(tmp_path, script(end=text))
    assert (result.status, result.out) == (0, "it does not fit\n"), result.text


def test_a_run_that_goes_on_after_another_was_begun_is_still_in_training(tmp_path: Path) -> None:
    text = """\
if step.index == 2 and not os.path.exists(f"begun {run.rank}"):
            open(f"begun {run.rank}", "w").close()
            second = torch.nn.Linear(6, 3)
            more = lightwork.distribute(second, torch.optim.SGD(second.parameters()), global_batch=16)
        if run.rank == 1 and step.index >= 4:
            os._exit(0)
"""
    result = lightwork_run(tmp_path, script(text, max_steps=50))
    assert result.status == 1, result.text
    assert "exited with status 0 in the middle of training" in result.err


def test_a_transform_that_torch_refuses_where_weights_are_brought_is_explained(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
from torch.func import grad
import lightwork

model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = lightwork.distribute(
    model, optimizer, global_batch=8, micro_batch=4, transport="group", placement="zero3"
)
for step in run.steps(torch.randn(8, 4), shuffle=False):
    for x in step:
        step.backward(grad(lambda x: model(x).square().mean())(x).sum())
"""
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert "saved tensor hooks" in result.err, result.text
    assert "placement='zero2'" in result.err, result.text


def test_a_part_of_a_model_in_bf16_that_is_called_outside_the_loop_is_explained(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
import lightwork

model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, precision="bf16")
model(torch.ones(2, 4))
model[0](torch.ones(2, 4))
"""
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert "must have the same dtype" in result.err, result.text
    assert "around a part of it write `with torch.autocast" in result.err, result.text
