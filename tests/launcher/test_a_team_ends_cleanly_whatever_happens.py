"""The edges of a team's life: workers that can not be started, signals at odd times, what workers leave behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lightwork.cli.main import main
from lightwork.launcher import local
from lightwork.launcher.script import Script
from lightwork.launcher.supervisor import Outcome
from tests.launcher.command import finish, left_running, lightwork_run, start, wait_until

#: Scripts run in forks of the test's process, whose streams are not those of descriptors 1 and 2.
STREAMS = """\
import os, signal, subprocess, sys, threading, time
sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
rank = int(os.environ["LIGHTWORK_RANK"])
open(f"pid{rank}", "w").write(str(os.getpid()))
"""


class Shown:
    """A display that keeps what it was given."""

    def __init__(self) -> None:
        self.out = b""
        self.error = b""

    def write_out(self, data: bytes) -> None:
        self.out += data

    def write_error(self, data: bytes) -> None:
        self.error += data

    def tick(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()


def launch(text: str, num_workers: int) -> tuple[Outcome, Shown]:
    """Run a script on a team of forks of this process."""
    Path("train.py").write_text(STREAMS + text)
    shown = Shown()
    script = Script(target="train.py")
    outcome = local.launch(script, num_workers, run_dir=Path.cwd(), settings={}, display=shown)
    return outcome, shown


def pids() -> list[int]:
    return [int(path.read_text()) for path in Path.cwd().glob("pid*") if path.read_text()]


def test_a_workers_standard_input_is_empty_also_for_what_it_starts() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"for the launcher")
    os.close(write_end)
    kept = os.dup(0)
    os.dup2(read_end, 0)
    try:
        outcome, shown = launch('print(os.readlink("/proc/self/fd/0"), len(subprocess.check_output(["cat"])))', 1)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(read_end)
    assert outcome.culprit is None
    assert shown.out == b"/dev/null 0\n", shown.error


def test_threads_end_before_exit_handlers_run_as_under_python() -> None:
    text = (
        "import atexit\n"
        'atexit.register(lambda: print("exit handler"))\n'
        'threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()\n'
    )
    _, shown = launch(text, 1)
    assert shown.out == b"thread\nexit handler\n", shown.error


def test_a_signal_without_a_name_is_told_by_number() -> None:
    outcome, _ = launch("os.kill(os.getpid(), 40)", 1)
    assert outcome.culprit is not None
    assert outcome.culprit.exit_status == 168
    assert "was killed by signal 40 before it called" in outcome.culprit.describe_end()


def test_workers_are_killed_when_another_can_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    real = local.start_worker
    started: list[BaseProcess] = []

    def start_two(*arguments: object, **more: object) -> BaseProcess:
        if len(started) == 2:
            wait_until(lambda: len(pids()) == 2)
            raise BlockingIOError("no more processes")
        started.append(real(*arguments, **more))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(local, "start_worker", start_two)
    with pytest.raises(BlockingIOError):
        launch("time.sleep(60)", 3)
    assert left_running(pids(), seconds=0.0) == []


def test_a_signal_while_workers_are_started_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    real = local.start_worker
    calls: list[int] = []

    def interrupt_the_second(*arguments: object, **more: object) -> BaseProcess:
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "start_worker", interrupt_the_second)
    handler, before = signal.getsignal(signal.SIGINT), time.monotonic()
    outcome, _ = launch("time.sleep(60)", 3)
    assert (outcome.interrupted, outcome.culprit) == (signal.SIGINT, None)
    assert time.monotonic() - before < 10.0
    assert len(calls) == 2, "no further one is started"
    assert signal.getsignal(signal.SIGINT) is handler
    assert left_running(pids(), seconds=0.0) == []


def test_what_a_worker_leaves_running_ends_soon_after_it_while_the_others_go_on() -> None:
    text = """
if rank == 0:
    while not os.path.exists("gone"):
        time.sleep(0.01)
else:
    left = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    open("left", "w").write(str(left.pid))
"""
    ended = Watch(lambda: left_running([int(Path("left").read_text())], seconds=20.0) == [])
    outcome, _ = ended.during(lambda: launch(text, 2))
    assert outcome.culprit is None
    assert ended.saw


class Watch:
    """A child that waits for a condition, and writes `gone` when it came."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self.saw = False

    def during(self, work: Callable[[], tuple[Outcome, Shown]]) -> tuple[Outcome, Shown]:
        child = os.fork()
        if child == 0:
            wait_until(lambda: Path("left").exists() and Path("left").read_text() != "")
            saw = self._condition()
            Path("gone").write_text("")
            os._exit(0 if saw else 1)
        try:
            return work()
        finally:
            self.saw = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pythons_resource_tracker_has_time_to_free_the_memory_of_a_killed_worker() -> None:
    name = f"lightwork-test-{os.getpid()}"
    text = f"""
from multiprocessing import resource_tracker, shared_memory
resource_tracker._resource_tracker = resource_tracker.ResourceTracker()  # not that of the test's process
for call in ("register", "unregister", "ensure_running"):
    setattr(resource_tracker, call, getattr(resource_tracker._resource_tracker, call))
memory = shared_memory.SharedMemory(create=True, size=1000, name="{name}")
os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome, shown = launch(text, 1)
    assert outcome.ended[0].status == -signal.SIGKILL, shown.error
    assert not Path("/dev/shm", name).exists()


def test_a_script_with_a_mistake_of_syntax_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, "x = 1\nif x\n    y\n")
    assert result.status == 1, result.text
    assert result.err.count("SyntaxError") == 1, result.text
    assert 'File "train.py", line 2' in result.err
    assert "runpy" not in result.err, result.text


def test_the_last_words_of_a_worker_that_exits_by_itself_are_shown(tmp_path: Path) -> None:
    text = (
        'import os, sys, time\nif os.environ["LIGHTWORK_RANK"] == "1": sys.exit("shard 1 is missing")\ntime.sleep(60)\n'
    )
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert result.err.count("shard 1 is missing") == 1, result.text


def test_a_run_whose_output_nobody_reads_any_more_ends(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, time\n"
        'open("pid" + os.environ["LIGHTWORK_RANK"], "w").write(str(os.getpid()))\n'
        'while True: print("a line", flush=True); time.sleep(0.01)\n'
    )
    process = start(tmp_path, "-m", "lightwork", "run", "-n", "2", "--run-dir", "here", "train.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    process.stdout = None
    result = finish(process, tmp_path / "here")
    assert result.status == 128 + signal.SIGPIPE, result.text
    assert "the reader of the output has closed it" in result.err, result.text
    assert "Traceback" not in result.err, result.text
    assert left_running(pids()) == []


def test_an_interruption_before_there_are_workers_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    Path("train.py").write_text("")
    monkeypatch.setattr("lightwork.cli.run.preload", interrupted)
    assert main(["run", "train.py"]) == 130
    assert capsys.readouterr().err == "lightwork: interrupted by SIGINT before the workers were started.\n"


def test_looking_for_a_module_does_not_import_its_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # They may start threads or compute, which the workers, being forked, would not survive.
    Path("careless").mkdir()
    Path("careless/__init__.py").write_text('open("imported", "w").close()\n')
    Path("careless/train.py").write_text("")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr("lightwork.cli.run.preload", lambda: None)
    monkeypatch.setattr(
        "lightwork.cli.run.launch",
        lambda *arguments, **more: Outcome(ended=(), culprit=None, interrupted=signal.SIGTERM),
    )
    assert main(["run", "-m", "careless.train"]) == 143
    assert not Path("imported").exists()
    for name in ("careless.test", "careless.train.more", "no_such_module.at.all"):
        assert main(["run", "-m", name]) == 2
        assert f"there is no module {name}" in capsys.readouterr().err
    assert not Path("imported").exists()


def test_a_run_directory_that_is_used_again_tells_of_the_new_run_alone(tmp_path: Path) -> None:
    train = tmp_path / "train.py"
    command = ("-m", "lightwork", "run", "-n", "2", "--run-dir", "here", "train.py")
    head = 'import json, os, sys, time\nrank = os.environ["LIGHTWORK_RANK"]\n'
    train.write_text(
        head
        + """\
if rank == "1":
    raise ValueError("of the first run")
with open(os.path.join(os.environ["LIGHTWORK_RUN_DIR"], "trace", "rank0.jsonl"), "a") as trace:
    for step in range(50):
        trace.write(json.dumps({"kind": "event", "name": "step", "at": time.time(), "step": step, "loss": 1.0,
            "grad_norm": None, "samples": 1, "tokens": 0, "micro_batches": [0]}) + "\\n")
"""
    )
    first = finish(start(tmp_path, *command), tmp_path / "here")
    assert first.err.count("ValueError: of the first run") == 1, first.text
    with (tmp_path / "here" / "trace" / "rank0.jsonl").open("a") as trace:  # whether or not rank 0 came that far
        record = {"kind": "event", "name": "step", "at": 1.0, "step": 49, "loss": 1.0, "grad_norm": None}
        trace.write(json.dumps({**record, "samples": 1, "tokens": 0, "micro_batches": [0]}) + "\n")

    train.write_text(head + 'if rank == "0": print(flush=True)\ntime.sleep(60)\n')
    process = start(tmp_path, *command)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    second = finish(process, tmp_path / "here")
    assert second.status == 143, second.text
    assert "interrupted by SIGTERM before the first step" in second.err, second.text

    train.write_text(head + 'if rank == "1": os.abort()\ntime.sleep(60)\n')
    third = finish(start(tmp_path, *command), tmp_path / "here")
    assert third.status == 128 + signal.SIGABRT, third.text
    assert "was killed by SIGABRT" in third.err, third.text
    assert "of the first run" not in third.err, third.text
    assert "of the first run" in third.log(1), "the log is kept"


def test_last_words_that_the_first_worker_said_too_are_shown_once(tmp_path: Path) -> None:
    text = """
import os, sys, time
from pathlib import Path
words = "the shard is missing"
if os.environ["LIGHTWORK_RANK"] == "0":
    print(words, file=sys.stderr, flush=True)
    Path("said").touch()
    time.sleep(60)
while not Path("said").exists():
    time.sleep(0.01)
sys.exit(words)
"""
    result = lightwork_run(tmp_path, text)
    assert result.status == 1, result.text
    assert result.err.count("the shard is missing") == 1, result.text
