"""Ctrl-C, and signals of a job's scheduler: they reach the script, whose loop ends behind a whole step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lightwork.cli.run import last_traceback
from tests.launcher.command import HEAD, Result, finish, lightwork_run, start

TRAIN = """\
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
run = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=2, run_dir="mine")
run.keep(scheduler=scheduler)
stop = False
def stop_soon(number, frame):
    global stop
    stop = True
if "usr1" in sys.argv:
    signal.signal(signal.SIGUSR1, stop_soon)
try:
    for epoch in run.epochs(6):
        for step in run.steps(dataset):
            for inputs, targets in step:
                if "slow" in sys.argv:
                    time.sleep(0.03)
                step.backward(F.cross_entropy(model(inputs), targets))
            scheduler.step()
            if step.index == 1:
                print("begun", flush=True)
            if stop:
                break
        if stop:
            break
except KeyboardInterrupt:
    print("caught after", run.step_index)
    if "raise" in sys.argv:
        raise
if "slow" in sys.argv:
    run.save()
print("digest", run.digest())
"""


def launched(tmp_path: Path, num_workers: int, *arguments: str, number: int = signal.SIGINT) -> Result:
    """Run it, send a signal when it has begun, and return how it ended; 0 workers: by plain python."""
    (tmp_path / "train.py").write_text(HEAD + TRAIN)
    command = ["-m", "lightwork", "run", "-n", str(num_workers), "--quiet"] if num_workers else []
    # Whoever runs the tests in the background lets them ignore it, and what they start.
    process = start(tmp_path, *command, "train.py", "slow", *arguments, within=["env", "--default-signal=INT"])
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, number)
    return finish(process, tmp_path / "runs" / "1")


def digest(result: Result) -> str:
    (line,) = (line for line in result.out.splitlines() if line.startswith("digest"))
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run comes to that is never stopped."""
    return digest(lightwork_run(tmp_path_factory.mktemp("whole"), HEAD + TRAIN, workers="1"))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_script_that_catches_it_saves_and_goes_on_to_the_same_bits(
    tmp_path: Path, whole: str, num_workers: int
) -> None:
    result = launched(tmp_path, num_workers)
    assert result.status == 0, result.text
    assert "caught after" in result.out
    assert "interrupted: training stops after this step" in result.err
    assert digest(result) != whole
    again = lightwork_run(tmp_path, HEAD + TRAIN, workers="2")
    assert "resumed after" in again.err
    assert digest(again) == whole


def test_a_script_that_does_not_catch_it_ends_without_a_traceback(tmp_path: Path) -> None:
    result = launched(tmp_path, 2, "raise")
    assert result.status == 130, result.text
    assert "Traceback" not in result.err
    assert "interrupted by SIGINT after step" in result.err


def test_a_signal_of_a_scheduler_s_reaches_the_script_s_handler(tmp_path: Path, whole: str) -> None:
    result = launched(tmp_path, 2, "usr1", number=signal.SIGUSR1)
    assert result.status == 0, result.text
    assert "caught" not in result.out
    assert digest(lightwork_run(tmp_path, HEAD + TRAIN, workers="1")) == whole


CHAIN = """\
Traceback (most recent call last):
  File "a.py", line 1
ValueError: the cause

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2
RuntimeError: the end"""

THREAD = """
Exception in thread Thread-1:
Traceback (most recent call last):
  File "c.py", line 3
KeyError: 'afterwards'
"""


def test_the_traceback_that_is_shown_is_that_of_the_error_that_ended_the_worker_with_its_cause() -> None:
    assert last_traceback("text\n" + CHAIN + "\n" + THREAD) == CHAIN
    assert last_traceback("Traceback (most recent call last):\nOSError: handled\nmore\n" + CHAIN) == CHAIN
    assert last_traceback(THREAD).endswith("KeyError: 'afterwards'")
    assert last_traceback("no error") == ""


def test_a_cause_is_shown_with_its_error_and_without_the_frames_of_the_package(tmp_path: Path) -> None:
    text = """\
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        if os.environ["LIGHTWORK_RANK"] == "1" and index == 9:
            raise ValueError("a bad sample")
        return torch.randn(6), 1
run = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=2)
for step in run.steps(Data(), shuffle=False):
    for inputs, targets in step:
        step.backward(F.cross_entropy(model(inputs), targets))
"""
    result = lightwork_run(tmp_path, HEAD + text, workers="2")
    assert result.status == 1
    assert "ValueError: a bad sample" in result.err
    assert "DataError" in result.err
    after = result.err.rpartition("direct cause of the following")[2]
    assert after.count("File ") == 1, result.err


def test_progress_is_not_shown_in_a_line_of_the_script_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightwork.observer import progress as module

    shown: list[str] = []
    display = module.RunProgress(tmp_path, 1, quiet=False, live=False)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(display, "_print", shown.append)
    monkeypatch.setattr(display._summary, "step", 3)
    display.write_out(b"epoch 1 ... ")
    display.tick()
    assert shown == []
    display.write_out(b"done\n")
    display.tick()
    assert len(shown) == 1


def test_a_machine_whose_name_is_not_known_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(HEAD + TRAIN)
    variables = "MASTER_ADDR=no-such-host.invalid MASTER_PORT=29999 RANK=1 LOCAL_RANK=1 WORLD_SIZE=2"
    result = finish(start(tmp_path, "train.py", within=["env", *variables.split()]), tmp_path / "mine")
    assert result.status == 1
    assert "MASTER_ADDR=no-such-host.invalid is not the name or address of a machine" in result.err
