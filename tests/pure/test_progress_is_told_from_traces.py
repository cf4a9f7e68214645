"""What an observer makes of a trace: while it is written, whole, and in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightwork.observer.progress import RunProgress
from lightwork.observer.summary import WINDOW, Summary
from lightwork.observer.tail import MAX_READ, Tail
from lightwork.trace import Trace


def test_a_tail_gives_each_complete_record_once(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    tail = Tail(path)
    assert tail.read() == [], "a file that is not there yet is empty"
    with path.open("w") as file:
        file.write('{"a": 1}\n{"a": 2}\n{"a"')
        file.flush()
        assert tail.read() == [{"a": 1}, {"a": 2}]
        assert tail.read() == []
        file.write(": 3}\n")
        file.flush()
        assert tail.read() == [{"a": 3}]
    assert tail.read() == []


def test_a_tail_that_is_far_behind_passes_over_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    count = 3 * MAX_READ // 100
    path.write_text("".join(json.dumps({"number": number, "filler": "x" * 80}) + "\n" for number in range(count)))
    tail = Tail(path)
    numbers = [record["number"] for record in tail.read()]
    assert 0.9 * MAX_READ / 110 < len(numbers) < count
    assert numbers == list(range(count - len(numbers), count)), "the last ones, without a gap"
    assert tail.read() == []


def step(index: int, at: float, micro_batches: list[int], **more: Any) -> dict[str, Any]:
    return {
        "kind": "event",
        "name": "step",
        "at": at,
        "step": index,
        "loss": 2.0 - index,
        "grad_norm": 0.5,
        "samples": 4 * len(micro_batches),
        "tokens": 0,
        "micro_batches": micro_batches,
        **more,
    }


def test_a_summary_tells_step_rate_time_left_and_shares() -> None:
    summary = Summary()
    assert (summary.done, summary.seconds_per_step, summary.seconds_left, summary.rates()) == (
        0,
        None,
        None,
        (0.0, 0.0),
    )
    summary.feed(0, {"kind": "event", "name": "steps", "at": 0.0, "first": 10, "total": 20})
    for index in range(10, 15):
        summary.feed(0, step(index, index * 2.0, [0, 1, 2], tokens=300))
        summary.feed(1, step(index, index * 2.0, [3], tokens=100))
    assert (summary.step, summary.loss, summary.grad_norm, summary.done) == (14, -12.0, 0.5, 5)
    assert summary.seconds_per_step == 2.0
    assert summary.seconds_left == 10.0
    assert summary.rates() == (8.0, 200.0)
    assert summary.shares() == {0: 0.75, 1: 0.25}


def test_a_summary_counts_only_the_last_steps_and_does_not_grow() -> None:
    summary = Summary()
    for index in range(3 * WINDOW):
        summary.feed(0, step(index, index * (1.0 if index < 2 * WINDOW else 4.0), [0]))
    assert summary.seconds_per_step == pytest.approx(4.0, rel=0.01)
    assert len(summary._amounts) <= WINDOW + 1


def test_a_summary_sorts_spans_into_activities_and_passes_over_what_it_does_not_know() -> None:
    summary = Summary()
    for name in ("load", "forward", "backward", "wait", "reduce", "update", "something new"):
        summary.feed(2, {"kind": "span", "name": name, "step": 0, "start": 0.0, "seconds": 1.0})
    summary.feed(2, {"kind": "counter", "name": "dropped_records", "step": -1, "value": 1})
    assert set(summary.workers[2].seconds) == {"load", "compute", "wait", "update"}
    assert summary.shares() == {2: 0.0}


def test_a_trace_is_read_by_the_progress_display(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "trace").mkdir()
    for rank in range(2):
        trace = Trace(tmp_path / "trace" / f"rank{rank}.jsonl", print)
        trace.event("start", rank=rank, world_size=2, pid=1)
        trace.event("steps", first=0, total=3)
        for index in range(3):
            trace.span("forward", index, rank, 1.0, 1.5)
            trace.span("wait", index, -1, 1.0, 1.25)
            trace.event("step", step=index, loss=1.5, grad_norm=1.0, samples=8, tokens=0, micro_batches=[rank])
        trace.close()
        trace.event("after the end is discarded")
    progress = RunProgress(tmp_path, 2, quiet=False)
    progress.write_out(b"from the script \xff\n")
    progress.write_error(b"its warning\n")
    progress.tick()
    assert progress.last_step == -1, "not before it is time to look"
    progress.close(finished=True)
    assert progress.last_step == 2
    assert progress.line().startswith("step 3/3  loss 1.5  ")
    out, err = capsysbinary.readouterr()
    assert out == b"from the script \xff\n", "bytes pass as they are"
    assert err.startswith(b"its warning\nlightwork: 3 steps in ")
    assert b"by 2 workers" in err


def test_in_a_terminal_the_display_stays_away_from_a_line_that_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    progress = RunProgress(tmp_path, 1, quiet=False)
    progress.write_out(b"from the script\n")
    out, err = capsysbinary.readouterr()
    assert out == b"from the script\n"
    assert b"starting" in err, "the display is back below it"
    progress.write_out(b"half a li")
    capsysbinary.readouterr()
    monkeypatch.setattr("lightwork.observer.progress.REFRESH_SECONDS", 0.0)
    progress.tick()
    assert b"starting" not in capsysbinary.readouterr().err
    progress.write_out(b"ne\n")
    assert b"starting" in capsysbinary.readouterr().err
    progress.close(finished=False)


def test_a_trace_names_spans_counters_and_events_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    trace = Trace(path, print)
    trace.span("forward", 4, 2, 10.0, 10.5)
    trace.span("update", 4, -1, 10.5, 10.75)
    trace.counter("bytes", 4, 123.0)
    trace.event("save", path="x", step=5)
    trace.close()
    forward, update, counter, event = (json.loads(line) for line in path.read_text().splitlines())
    assert {k: forward[k] for k in ("kind", "name", "step", "micro", "seconds")} == {
        "kind": "span",
        "name": "forward",
        "step": 4,
        "micro": 2,
        "seconds": 0.5,
    }
    assert "micro" not in update
    assert update["start"] == pytest.approx(forward["start"] + 0.5, abs=1e-5)
    assert counter == {"kind": "counter", "name": "bytes", "step": 4, "value": 123.0}
    assert (event["name"], event["path"], event["step"]) == ("save", "x", 5)


def test_a_trace_without_a_path_discards_everything() -> None:
    trace = Trace(None, print)
    trace.span("forward", 0, 0, 0.0, 1.0)
    trace.event("start")
    trace.close()
    trace.close()


def test_what_does_not_fit_the_queue_is_counted_also_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightwork.trace.MAX_PENDING", 3)
    monkeypatch.setattr("lightwork.trace.WRITE_INTERVAL", 60.0)
    path, told = tmp_path / "rank0.jsonl", list[str]()
    trace = Trace(path, told.append)
    for index in range(8):
        trace.span("forward", index, 0, 0.0, 1.0)
    trace.event("steps")
    trace.close()
    *spans, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert [span["step"] for span in spans] == [0, 1, 2]
    assert (last["name"], last["value"]) == ("dropped_records", 6)
    assert told == []
