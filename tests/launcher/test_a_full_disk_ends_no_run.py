"""Whatever file meets a full disk, training goes on, and what is lost is told once and counted."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightwork.observer.tail import Tail
from lightwork.trace import Trace
from tests.launcher.command import lightwork_run, script, wait_until
from tests.training import run_team

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")

#: A disk without room: every file that a run writes for its readers leads there.
FILES = ("log/rank0.log", "log/rank1.log", "trace/rank0.jsonl", "trace/rank1.jsonl", "spec.json", "plan.json")
CHATTER = "print('standard output', step.index, flush=True); print('standard error', file=sys.stderr, flush=True)"


def test_a_run_directory_on_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to("/dev/full")
    result = lightwork_run(tmp_path, script(CHATTER, end="print('trained to the end')"), "--run-dir", str(folder))
    assert result.status == 0, result.text
    assert "trained to the end" in result.out
    assert result.err.count("standard error") >= 6, "the main worker's output is shown"
    for rank in (0, 1):
        log = f"{folder}/log/rank{rank}.log"
        assert result.err.count(f"the log {log} can not be written (No space left on device)") == 1, result.err
        assert result.err.count(f"bytes of output are not in the log {log}") == 1, result.err
    for told in (f"the trace {folder}/trace/rank0.jsonl can not be written", "records of the trace"):
        assert result.err.count(told) == 1, result.err
    for name in ("spec", "plan"):
        assert result.err.count(f"{folder}/{name}.json can not be written (No space left on device)") == 1, result.err
        assert not (folder / f"{name}.json").exists()
    assert (folder / "roster.json").exists()


def test_logs_and_traces_that_can_not_be_made_end_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    for name in FILES[:4]:
        (folder / name).mkdir(parents=True)  # a folder in the place of the file
    result = lightwork_run(tmp_path, script(CHATTER, end="print('trained to the end')"), "--run-dir", str(folder))
    assert result.status == 0, result.text
    assert "trained to the end" in result.out
    assert result.err.count("rank0.log can not be written (Is a directory)") == 1, result.err
    assert result.err.count("rank0.jsonl can not be written (Is a directory). Training goes on without it.") == 1


def test_a_full_disk_loses_records_and_nothing_else(tmp_path: Path) -> None:
    told: list[str] = []
    full = tmp_path / "rank0.jsonl"
    full.symlink_to("/dev/full")
    trace = Trace(full, told.append)
    for index in range(5):
        trace.event("step", step=index)
        time.sleep(0.3)  # the writing thread comes by
    trace.close()
    trace.close()
    assert len(told) == 2, told
    assert told[0].endswith("can not be written (No space left on device). Training goes on.")
    assert told[1].startswith("5 records of the trace")
    assert told[1].endswith("are lost (No space left on device).")


def test_a_record_that_is_cut_off_by_a_full_disk_does_not_spoil_the_next(tmp_path: Path) -> None:
    def write() -> list[str]:
        told: list[str] = []
        trace = Trace(path, told.append)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
        try:
            for index in range(4):
                trace.event("step", step=index, text="." * 20)
            wait_until(lambda: bool(told))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        trace.event("save")
        trace.close()
        return told

    path = tmp_path / "rank0.jsonl"
    (told,) = run_team(1, write)
    assert "File too large" in told[0]
    records = Tail(path).read()
    assert [record.get("step") for record in records] == [0, None, -1]
    assert (records[1]["name"], records[2]["value"]) == ("save", 3)
    assert told[1].startswith("3 records of the trace")


def test_output_that_leads_to_a_full_disk_leads_nowhere_and_is_told(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from lightwork.observer.progress import RunProgress
progress = RunProgress(Path({str(tmp_path)!r}), 1, quiet=False, live=False)
for line in range(3):
    progress.write_out(b"a line" * 2000)
    progress.tick()
progress.close(finished=True)
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "lightwork: output can not be written (No space left on device); the rest is in the logs alone.\n"
    )
