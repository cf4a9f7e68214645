"""What an observer meets in practice: damaged traces, fast runs, workers read at different moments, much output."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightwork.observer import progress as module
from lightwork.observer.progress import RunProgress
from lightwork.observer.summary import WINDOW, Summary
from lightwork.observer.tail import Tail


def step(index: int, at: float, samples: int = 8) -> dict[str, Any]:
    amounts = {"samples": samples, "tokens": 0, "micro_batches": [0]}
    return {"kind": "event", "name": "step", "at": at, "step": index, "loss": 1.0, "grad_norm": 2.5, **amounts}


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(b'{"a": 1}\n{"kind": "sp\n\n12\n\xff\xfe\n{"a": 2}\n')
    assert Tail(path).read() == [{"a": 1}, {"a": 2}]
    summary = Summary()
    summary.feed(0, {"a": 1})
    assert summary.step == -1


def test_a_tail_may_leave_an_earlier_runs_records_unread(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    assert Tail(path, skip_existing=True).read() == []
    write(path, {"a": 1})
    tail = Tail(path, skip_existing=True)
    write(path, {"a": 2})
    assert tail.read() == [{"a": 2}]


def test_a_tail_that_is_far_behind_keeps_what_is_rare(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    many = [{"number": number} for number in range(1000)]
    write(path, {"name": "rare", "number": -1}, *many)
    tail = Tail(path, max_read=1000, keep='"name": "rare"')
    records = tail.read()
    assert records[0] == {"name": "rare", "number": -1}
    assert [r["number"] for r in records[1:]] == list(range(1001 - len(records), 1000)), "then the last, without a gap"
    assert len(records) < 100
    write(path, *many, {"name": "rare", "number": -2})
    assert [r["number"] for r in tail.read() if "name" in r] == [-2], "each once"
    assert tail.read() == []


def test_a_fast_run_that_was_hardly_looked_at_has_its_total_and_its_duration(tmp_path: Path) -> None:
    path = tmp_path / "trace" / "rank0.jsonl"
    start = time.time()
    write(path, {"kind": "event", "name": "steps", "at": start, "first": 0, "total": 6000})
    write(path, *(step(index, start + 0.001 * (index + 1)) for index in range(6000)))
    progress = RunProgress(tmp_path, 1, quiet=False)
    progress.update()
    assert progress.line().startswith("step 6000/6000  loss 1  grad norm 2.5  8 k samples/s  time left 0.0 s")
    assert "6000 steps in 6.0 s by 1 worker, 8 k samples/s; traces" in progress.final_line()


def test_the_runs_of_a_script_that_has_several_are_told_apart(tmp_path: Path) -> None:
    start = time.time()
    progress = RunProgress(tmp_path, 1, quiet=False)
    for name, num in (("generator", 3), ("critic", 5)):
        path = tmp_path / name / "trace" / "rank0.jsonl"
        path.parent.mkdir(parents=True)
        write(path, {"kind": "event", "name": "steps", "at": start, "first": 0, "total": 6})
        write(path, *(step(index, start + index + 1) for index in range(num)))
    progress.update()
    assert progress.line().startswith("critic:  step 5/6")
    assert progress.last_step == 4
    lines = progress.final_line().splitlines()
    assert ["critic: 5 steps" in lines[0], "generator: 3 steps" in lines[1], len(lines)] == [True, True, 2]
    assert lines[0].endswith("/critic")


def test_a_summary_that_never_saw_the_beginning_counts_from_what_it_saw() -> None:
    summary = Summary()
    for index in range(50, 60):
        summary.feed(0, step(index, 1e9 + index))
    assert summary.seconds == 9.0


def test_rates_are_right_while_one_worker_is_read_less_far_than_another() -> None:
    summary = Summary()
    for index in range(100):
        summary.feed(0, step(index, index * 1.0))
    for index in range(60):
        summary.feed(1, step(index, index * 1.0))
    assert summary.rates()[0] == pytest.approx(16.0)
    for index in range(10 * WINDOW):
        summary.feed(1, step(index, index * 1.0))
    assert len(summary._amounts) <= 2 * WINDOW + 1


def test_a_summary_goes_on_when_the_worker_that_told_it_first_is_gone() -> None:
    summary = Summary()
    for index in range(5):
        for rank in (0, 1):
            summary.feed(rank, step(index, 1e9 + index))
    for index in range(5, 9):
        summary.feed(1, step(index, 1e9 + index))
    assert summary.step == 8
    assert summary.seconds_per_step == 1.0
    summary.feed(0, step(6, 1e9 + 6))  # one that is read late
    assert summary.step == 8
    assert set(summary.shares()) == {0, 1}
    for index in range(9, 9 + WINDOW):
        summary.feed(1, step(index, 1e9 + index))
    assert set(summary.shares()) == {1}


def test_much_output_is_drawn_together_in_order_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 60.0)
    progress = RunProgress(tmp_path, 1, quiet=False, live=True)
    for number in range(100):
        progress.write_out(b"line %d\n" % number)
        progress.tick()
    out, _ = capsysbinary.readouterr()
    assert out.count(b"\n") < 10, "most of it waits for the next time"
    progress.write_out(b"no end")
    progress.close(finished=False)
    rest, _ = capsysbinary.readouterr()
    assert out + rest == b"".join(b"line %d\n" % number for number in range(100)) + b"no end"


def test_without_a_terminal_output_passes_at_once(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    progress = RunProgress(tmp_path, 1, quiet=False, live=False)
    for _ in range(3):
        progress.write_out(b"x")
        assert capsysbinary.readouterr().out == b"x"
    progress.close(finished=False)


def test_a_file_is_no_terminal_even_where_colour_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = RunProgress(tmp_path, 1, quiet=False, live=False)
    progress.write_out(b"x\n")
    progress.close(finished=False)
    assert capsysbinary.readouterr() == (b"x\n", b"")


def test_the_streams_that_workers_inherit_are_left_alone(tmp_path: Path) -> None:
    before = (sys.stdout, sys.stderr)
    progress = RunProgress(tmp_path, 1, quiet=False, live=True)
    during = (sys.stdout, sys.stderr)
    progress.close(finished=False)
    assert during == before
