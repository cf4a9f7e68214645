"""Loading workers, slow and stopped and surplus workers, and what a run leaves behind: in real processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import lightwork
from lightwork.transport import late
from tests.training import Numbered, new_folder, run_team, seen_by_team, tiny_run


def test_loading_workers_change_neither_order_nor_augmentation() -> None:
    alone = seen_by_team(run_team, 1, Numbered(21))
    assert seen_by_team(run_team, 2, DataLoader(Numbered(21), shuffle=True, num_workers=1)) == alone


def test_a_slow_worker_is_relieved_of_micro_batches_and_no_bit_changes() -> None:
    folder = new_folder()

    def job(slow_rank: int) -> tuple[str, int]:
        run = tiny_run(run_dir=folder, global_batch=16)
        computed = 0
        for step in run.steps(Numbered(64), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
                computed += 1
                time.sleep(0.06 if run.rank == slow_rank else 0.005)
        return run.digest(), computed

    ((alone, _),) = run_team(1, lambda: job(-1))
    results = run_team(2, lambda: job(1))
    assert {digest for digest, _ in results} == {alone}
    counts = [computed for _, computed in results]
    assert sum(counts) == 32
    assert counts[0] > counts[1], "nothing was taken over from the slow worker"


@pytest.mark.parametrize(("seconds", "is_named"), [((0.35, 0.6), False), ((0.0, 0.6), True)])
def test_who_is_waited_for_is_named_after_a_long_wait_and_not_after_a_long_step(
    seconds: tuple[float, float], is_named: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        late.NAME_AFTER_SECONDS = 0.8
        run = tiny_run(plan=lightwork.Plan(steal=False))
        for step in run.steps(Numbered(8), epochs=1):
            for _, x in step:
                time.sleep(seconds[run.rank])
                step.backward(run.model(x).mean())

    run_team(2, job)
    assert ("rank 0 waits in step 0 for: rank 1" in capfd.readouterr().err) == is_named


def test_without_stealing_everyone_computes_its_own() -> None:
    def job() -> int:
        run = tiny_run(plan=lightwork.Plan(steal=False))
        computed = 0
        for step in run.steps(Numbered(32), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
                computed += 1
                time.sleep(0.02 * run.rank)
        return computed

    assert run_team(2, job) == [8, 8]


def test_surplus_workers_are_idle_and_say_so(capfd: pytest.CaptureFixture[str]) -> None:
    def job() -> str:
        run = tiny_run(global_batch=4, micro_batch=2)
        for step in run.steps(Numbered(8), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
        return run.digest()

    assert len(set(run_team(4, job))) == 1
    assert "4 workers for 2 micro-batches an update: 2 idle" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["anonymous", "file"])
def test_the_shared_memory_leaves_nothing_behind(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(Path("/dev/shm").iterdir())

    def mappings_here() -> set[str]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {line for line in maps if "lightwork" in line and "rendezvous" not in line}

    inherited = mappings_here()  # what other tests' tracebacks still hold

    def job() -> tuple[str, set[str]]:
        run = tiny_run(plan=lightwork.Plan(shared_memory=kind), run_dir=folder)
        for step in run.steps(Numbered(16), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
        return run.digest(), mappings_here() - inherited

    folder = tmp_path / "run"
    results = run_team(2, job)
    assert len({digest for digest, _ in results}) == 1
    mappings = results[0][1]
    assert mappings
    assert all(("/memfd:" in line) == (kind == "anonymous") for line in mappings)
    assert not [p for p in tmp_path.iterdir() if not p.is_dir()]
    assert set(Path("/dev/shm").iterdir()) == before


def test_the_traces_hold_every_phase_of_every_step() -> None:
    folder = new_folder()

    def job() -> None:
        run = tiny_run(run_dir=folder, clip_grad_norm=1.0)
        for step in run.steps(Numbered(16), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
        run.close()

    run_team(2, job)
    spans = set()
    for rank in (0, 1):
        records = [json.loads(line) for line in (folder / "trace" / f"rank{rank}.jsonl").read_text().splitlines()]
        spans |= {(r["name"], r["step"]) for r in records if r["kind"] == "span"}
        assert [r["name"] for r in records if r["kind"] == "event"][:2] == ["start", "steps"]
    assert {(name, 1) for name in ("load", "forward", "backward", "wait", "reduce", "update")} <= spans
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["clip_grad_norm"] == 1.0
    assert json.loads((folder / "plan.json").read_text())["world_size"] == 2
    assert [m["rank"] for m in json.loads((folder / "roster.json").read_text())["members"]] == [0, 1]


def test_a_worker_that_is_stopped_for_a_while_is_waited_for_and_not_blamed() -> None:
    def job() -> str:
        run = tiny_run()
        other = run._team.presence.pid(1)

        def pause() -> None:
            for _ in range(6):
                time.sleep(0.03)
                os.kill(other, signal.SIGSTOP)
                time.sleep(0.35)  # longer than a waiting worker waits before it looks after the others
                os.kill(other, signal.SIGCONT)

        if run.is_main:
            threading.Thread(target=pause).start()
        for step in run.steps(Numbered(64), epochs=12):
            for _, x in step:
                step.backward(run.model(x).mean())
            digest = run.digest()
            time.sleep(0.01)
        return digest

    (alone,) = run_team(1, undisturbed)
    assert run_team(2, job) == [alone] * 2


def undisturbed() -> str:
    run = tiny_run()
    for step in run.steps(Numbered(64), epochs=12):
        for _, x in step:
            step.backward(run.model(x).mean())
    return run.digest()
