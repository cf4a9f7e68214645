"""What a host does about another one that it waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from lightwork.team.neighbours import Neighbours
from lightwork.transport import late


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that does nothing for long."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def wait(neighbours: Neighbours, seconds: float) -> None:
    start = time.monotonic()
    while (waited := time.monotonic() - start) < seconds:
        neighbours.waits_for(1, waited)
        time.sleep(0.05)


def test_it_is_named_once_in_a_while(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(late, "NAME_AFTER_SECONDS", 0.2)
    wait(Neighbours(0, [0, 10], {}, 0.3), 1.0)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lightwork: rank 0 has been waiting for rank 10 for 0 s.")


def test_one_that_is_stopped_is_ended_after_its_lease(
    other: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    neighbours = Neighbours(0, [0, 10], {1: other.pid}, 1.0)
    other.send_signal(signal.SIGSTOP)
    wait(neighbours, 0.5)
    assert other.poll() is None
    wait(neighbours, 1.0)
    assert other.wait(5) == -signal.SIGKILL
    told = capfd.readouterr().err
    assert f"rank 10 (pid {other.pid}) is ended: it was stopped for 1." in told
    assert "s while rank 0 waited for it. To wait for stopped workers: --set lease=0." in told


@pytest.mark.parametrize("case", ["it runs", "it goes on in between", "lease=0", "this one was stopped itself"])
def test_it_lives_where(other: subprocess.Popen[bytes], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = Neighbours(0, [0, 10], {1: other.pid}, 0.0 if case == "lease=0" else 0.8)
    if case != "it runs":
        other.send_signal(signal.SIGSTOP)
    wait(neighbours, 0.3)
    if case == "it goes on in between":
        other.send_signal(signal.SIGCONT)
        wait(neighbours, 0.1)
        other.send_signal(signal.SIGSTOP)
    if case == "this one was stopped itself":
        monkeypatch.setattr("lightwork.team.neighbours._MOST_BETWEEN", 0.1)
        time.sleep(1.0)
    wait(neighbours, 1.0 if case in ("it runs", "lease=0") else 0.1)
    assert other.poll() is None


def test_another_process_that_has_its_number_is_left_alone(other: subprocess.Popen[bytes]) -> None:
    """As psutil sees it: a process that began at another time."""
    neighbours = Neighbours(0, [0, 10], {1: other.pid}, 0.1)
    process = neighbours._processes[1]
    process._create_time = process.create_time() - 100
    process._ident = (process.pid, process._create_time)
    other.send_signal(signal.SIGSTOP)
    wait(neighbours, 0.5)
    assert other.poll() is None
