"""`lightwork scale` lets workers come and go while they train, SIGTERM lets one go; the bits stay the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightwork.launcher.requests import ask
from tests.launcher.command import environment, finish, left_running, lightwork_run, pids_of, script, start, wait_until

END = 'print("end of", run.rank, run.digest(), flush=True)\n'
SLOW = "time.sleep(0.02)"
STEPS = 60


def digests(text: str) -> dict[str, str]:
    return dict(re.findall(r"end of (\d) (\w+)", text))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = lightwork_run(tmp_path_factory.mktemp("alone"), script(max_steps=STEPS, end=END), workers="1")
    return digests(result.out)["0"]


def begin(folder: Path, text: str, *options: str, workers: str) -> subprocess.Popen[str]:
    """Start a script, and return when its workers train."""
    (folder / "train.py").write_text(text)
    process = start(folder, "-m", "lightwork", "run", "-n", workers, *options, "train.py")
    trace = folder / "runs" / "1" / "trace" / "rank0.jsonl"
    wait_until(lambda: trace.exists() and '"name": "step"' in trace.read_text())
    return process


def scale(folder: Path, workers: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "lightwork", "scale", "runs/1", workers]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


def there(folder: Path, text: str) -> bool:
    return text in (folder / "runs" / "1" / "log" / "rank0.log").read_text()


def test_workers_come_and_go_and_the_bits_are_the_same(tmp_path: Path, undisturbed: str) -> None:
    process = begin(tmp_path, script(SLOW, max_steps=STEPS, end=END), workers="2")
    assert scale(tmp_path, "4") == (0, "lightwork: 4 workers: ranks 2, 3 come.\n")
    wait_until(lambda: all(there(tmp_path, f"rank {rank} (pid") for rank in (2, 3)))
    assert ask(tmp_path / "runs" / "1", 3) == "3 workers: ranks 3 go after their step."
    assert ask(tmp_path / "runs" / "1", 3) == "3 workers, as there are."
    result = finish(process, tmp_path / "runs" / "1")
    assert result.status == 0, result.text
    assert digests(result.out) == {"0": undisturbed}
    assert digests(result.log(1)) == {"1": undisturbed}
    assert digests(result.log(2)) == {"2": undisturbed}
    assert digests(result.log(3)) == {}
    assert re.search(r"rank 3 \(pid \d+\) has left, as it was told. The others go on.", result.err), result.text
    assert left_running(result.pids()) == []


def test_a_team_shrinks_to_one_and_grows_again(tmp_path: Path, undisturbed: str) -> None:
    process = begin(tmp_path, script(SLOW, max_steps=STEPS, end=END), workers="3")
    assert (tmp_path / "runs" / "1").stat().st_mode & 0o777 == 0o700, "who can write there can change the team"
    pids = pids_of(tmp_path / "runs" / "1")
    assert ask(tmp_path / "runs" / "1", 1) == "1 worker: ranks 1, 2 go after their step."
    wait_until(lambda: left_running(pids[1:], 0.0) == [])
    assert ask(tmp_path / "runs" / "1", 3) == "3 workers: ranks 1, 2 come."
    result = finish(process, tmp_path / "runs" / "1")
    assert result.status == 0, result.text
    assert {digests(result.log(rank))[str(rank)] for rank in range(3)} == {undisturbed}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_sent_sigterm_leaves_after_its_step(tmp_path: Path, undisturbed: str, rank: int) -> None:
    at = f"{SLOW}\n        if run.rank == {rank} and step.index == 3 and not sent:\n"
    at += "            sent.append(step.index)\n            os.kill(os.getpid(), signal.SIGTERM)"
    result = lightwork_run(tmp_path, "sent = []\n" + script(at, max_steps=STEPS, end=END), workers="2")
    assert result.status == 0, result.text
    other = 1 - rank
    assert digests(result.out) == {str(other): undisturbed}
    log = result.log(rank)
    assert f"rank {rank} was told to leave (SIGTERM), and does after this step." in log
    assert "Traceback" not in log
    assert f"rank {rank} (pid {result.pids()[rank]}) has left, as it was told. The others go on." in result.err
    steps = (result.run_dir / "trace" / f"rank{rank}.jsonl").read_text().count('"name": "step"')
    assert steps == 4, "its part of the step that it was in counts"


def test_the_last_worker_that_is_sent_sigterm_ends_as_ever(tmp_path: Path) -> None:
    at = "if step.index == 3: os.kill(os.getpid(), signal.SIGTERM)"
    result = lightwork_run(tmp_path, script(at, max_steps=STEPS, end=END), workers="1")
    assert result.status == 128 + signal.SIGTERM, result.text


def test_sigterm_to_the_launcher_ends_all_at_once(tmp_path: Path) -> None:
    process = begin(tmp_path, script("time.sleep(0.1)", max_steps=STEPS), workers="2")
    os.kill(process.pid, signal.SIGTERM)
    result = finish(process, tmp_path / "runs" / "1", timeout=4.0)
    assert result.status == 128 + signal.SIGTERM, result.text
    assert "was told to leave" not in result.text
    assert left_running(result.pids()) == []


@pytest.mark.parametrize(
    ("options", "workers", "wanted", "said"),
    [
        ((), "2", "99", "99 workers are more than the team has places for, which is 8"),
        ((), "2", "0", "0 is not a number of workers from 1 upwards"),
        ((), "1", "2", "it is one that never can: one worker alone"),
        (("--transport", "group"), "2", "3", "workers with memories of their own"),
        (("--set", "elastic=false"), "2", "3", "--set elastic=false"),
    ],
)
def test_what_can_not_be_is_refused_by_name(
    tmp_path: Path, options: tuple[str, ...], workers: str, wanted: str, said: str
) -> None:
    process = begin(tmp_path, script(SLOW, max_steps=STEPS), *options, workers=workers)
    status, text = scale(tmp_path, wanted)
    result = finish(process, tmp_path / "runs" / "1")
    assert result.status == 0, result.text
    assert status == 2
    assert said in text


def test_where_nobody_trains_nobody_answers(tmp_path: Path) -> None:
    assert "there is no run directory runs/1" in scale(tmp_path, "2")[1]
    (tmp_path / "runs" / "1").mkdir(parents=True)
    status, text = scale(tmp_path, "2")
    assert status == 2
    assert "no lightwork run answers in runs/1: it has ended, or runs elsewhere." in text
    assert list((tmp_path / "runs" / "1").iterdir()) == []
