"""Data, evaluation, metrics, early stopping, edits and slow workers: the same everywhere, for any team."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightwork
from tests.cases import CASES, vectors
from tests.training import distributed, new_folder, run_team


class Numbered(Dataset[Any]):
    """Samples that know their id, augmented by all three random generators."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        noise = torch.rand(3) + float(np.random.rand()) + torch.randn(3)
        return index, noise


def tiny_run(**settings: Any) -> lightwork.Run:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return lightwork.distribute(
        model, optimizer, **{"global_batch": 8, "micro_batch": 2, "run_dir": new_folder(), **settings}
    )


def seen_by_team(num_workers: int, data: Any, **settings: Any) -> dict[tuple[int, int], dict[int, list[float]]]:
    """Return what came to whom, merged over the workers: (epoch, step) -> sample id -> its augmented values."""

    def job() -> list[tuple[int, int, int, list[float]]]:
        run = tiny_run()
        seen = []
        for step in run.steps(data, epochs=2, **settings):
            for ids, x in step:
                step.backward(run.model(x).mean())
                seen.extend((step.epoch, step.index, i, row.tolist()) for i, row in zip(ids.tolist(), x, strict=True))
        return seen

    merged: dict[tuple[int, int], dict[int, list[float]]] = {}
    for worker in run_team(num_workers, job):
        for epoch, step, sample, values in worker:
            of_step = merged.setdefault((epoch, step), {})
            assert sample not in of_step, "a sample came twice"
            of_step[sample] = values
    return merged


def test_every_sample_comes_once_an_epoch_in_a_new_order_and_alike_for_any_team() -> None:
    alone = seen_by_team(1, Numbered(21))
    for epoch in (0, 1):
        ids = [i for (e, _), samples in alone.items() if e == epoch for i in samples]
        assert sorted(ids) == list(range(21))
    first, second = (sorted(alone[0, 0]), sorted(alone[1, 3]))
    assert first != second
    for num_workers in (2, 3, 5):
        assert seen_by_team(num_workers, Numbered(21)) == alone


def test_loading_workers_change_neither_order_nor_augmentation() -> None:
    alone = seen_by_team(1, Numbered(21))
    assert seen_by_team(2, DataLoader(Numbered(21), shuffle=True, num_workers=1)) == alone


def test_the_order_can_be_given() -> None:
    seen = seen_by_team(2, Numbered(21), order=lambda epoch: [3, 7, 4, 1 + epoch])
    assert {place: sorted(samples) for place, samples in seen.items()} == {(0, 0): [1, 3, 4, 7], (1, 1): [2, 3, 4, 7]}


def test_evaluation_sees_each_sample_once_and_leaves_no_trace() -> None:
    case = CASES["convolution, batch norm"]

    def job(evaluate: bool) -> tuple[list[str], list[float]]:
        run, _ = distributed(case)
        digests, means = [], []
        for step in run.steps(case.dataset(), epochs=1):
            for batch in step:
                step.backward(case.loss(run.model, batch)[0])
            if evaluate:
                modes = [module.training for module in run.model.modules()]
                with run.evaluate(case.dataset()) as ev:
                    for x, y in ev:
                        assert not run.model.training
                        assert not torch.is_grad_enabled()
                        ev.add("loss", F.cross_entropy(run.model(x), y))
                        ev.add("samples", len(x), weight=1)
                assert modes == [module.training for module in run.model.modules()]
                assert ev["samples"] == 2.0  # the mean over 22 batches of 2
                means.append(ev["loss"])
            digests.append(run.digest())
        return digests, means

    (without,) = run_team(1, lambda: job(False))
    (alone,) = run_team(1, lambda: job(True))
    assert alone[0] == without[0]
    for num_workers in (2, 3):
        assert run_team(num_workers, lambda: job(True)) == [alone] * num_workers


def test_metrics_are_combined_alike_for_any_team() -> None:
    def job() -> list[tuple[float, float]]:
        run = tiny_run()
        means = []
        for step in run.steps(Numbered(21), epochs=1):
            for ids, x in step:
                step.backward(run.model(x).mean())
                step.add("id", ids.double().mean())
                if 7 in ids.tolist():
                    step.add("only here", 5.0, weight=3)
            means.append((step["id"], step.metrics.get("only here", -1.0)))
        return means

    (alone,) = run_team(1, job)
    assert sorted(value for _, value in alone) == [-1.0, -1.0, 5.0]
    assert np.average([mean for mean, _ in alone], weights=[8, 8, 5]) == pytest.approx(10.0)
    assert run_team(3, job) == [alone] * 3


def test_a_global_batch_without_weight_changes_nothing() -> None:
    def job() -> bool:
        run = tiny_run()
        before = run.digest()
        for step in run.steps(Numbered(8), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean() * float("nan"), weight=0)
        return step.loss == 0.0 and run.digest() == before

    assert run_team(2, job) == [True, True]


def test_early_stopping_is_agreed_by_all() -> None:
    def job() -> tuple[int, str]:
        run = tiny_run()
        last = -1
        for step in run.steps(Numbered(64), epochs=20):
            for _, x in step:
                step.backward(run.model(x).mean())
            last = step.index
            if run.rank == 1 and step.index == 5:  # one worker alone decides
                break
        run.save(run.run_dir / "end")
        return last, run.digest()

    results = run_team(3, job)
    assert len({digest for _, digest in results}) == 1
    assert {last for last, _ in results} <= {5, 6}


def test_a_loop_may_follow_an_early_stop() -> None:
    def job() -> list[int]:
        run = tiny_run()
        indices = []
        for _ in range(2):
            for step in run.steps(Numbered(64), epochs=20):
                for _, x in step:
                    step.backward(run.model(x).mean())
                indices.append(step.index)
                if step.index % 3 == 2:
                    break
        return indices

    assert run_team(2, job) == [[0, 1, 2, 3, 4, 5]] * 2


def test_an_edit_is_applied_once() -> None:
    def job(precision: str) -> tuple[list[float], str]:
        run = tiny_run(precision=precision)
        with run.edit(), torch.no_grad():
            run.model.weight.add_(1.0)
        first = run.model.weight.float().tolist()[0]
        for step in run.steps(Numbered(16), epochs=1):
            for _, x in step:
                step.backward(run.model(x).float().mean())
            with run.edit(), torch.no_grad():
                run.model.bias.zero_()
        assert run.state_dict()["bias"].item() == 0.0
        return first, run.digest()

    torch.manual_seed(0)
    expected = (nn.Linear(3, 1).weight + 1).tolist()[0]
    for precision in ("fp32", "bf16"):
        (alone,) = run_team(1, lambda p=precision: job(p))
        assert alone[0] == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 0)
        assert run_team(3, lambda p=precision: job(p)) == [alone] * 3


def test_an_edit_that_replaces_a_parameter_is_refused() -> None:
    def job() -> str:
        run = tiny_run()
        with pytest.raises(lightwork.UsageError) as caught, run.edit():
            run.model.weight = nn.Parameter(torch.zeros(1, 3))
        return str(caught.value)

    assert "added, removed or replaced" in run_team(1, job)[0]


def test_random_numbers_between_steps_are_the_same_on_every_worker() -> None:
    def job() -> list[float]:
        run = tiny_run()
        drawn = []
        for step in run.steps(Numbered(24), epochs=1):
            for _, x in step:
                step.backward(run.model(x).mean())
            drawn.append(float(torch.rand(())) + float(np.random.rand()))
        return drawn

    (alone,) = run_team(1, job)
    assert len(set(alone)) == 3
    assert run_team(3, job) == [alone] * 3


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


class Island(nn.Module):
    """Switches autocast off, around a module and around a bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.types: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        self.types = [h.dtype]
        with torch.autocast("cpu", enabled=False):
            h = self.router(h.float())
            self.types.append(h.dtype)
            h = h + F.linear(h, self.router.weight)
            self.types.append(h.dtype)
        out = self.last(h)
        self.types.append(out.dtype)
        return out


def test_regions_without_autocast_compute_in_fp32_with_fp32_weights() -> None:
    def job() -> tuple[list[str], str, float]:
        torch.manual_seed(0)
        model = Island()
        weight = model.router.weight.detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = lightwork.distribute(
            model, optimizer, global_batch=16, micro_batch=4, precision="bf16", run_dir=new_folder()
        )
        h = torch.randn(2, 16)
        for step in run.steps(vectors(), epochs=1):
            for x, y in step:
                loss = F.cross_entropy(model(x), y)
                assert loss.dtype == torch.float32
                if step.index == 0:
                    with torch.autocast("cpu", enabled=False):
                        assert torch.equal(F.linear(h, model.router.weight), F.linear(h, weight))
                step.backward(loss)
        return [str(t) for t in model.types], run.digest(), step.grad_norm

    (alone,) = run_team(1, job)
    assert alone[0] == ["torch.bfloat16", "torch.float32", "torch.float32", "torch.bfloat16"]
    assert run_team(2, job) == [alone] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def job(recompute: bool) -> str:
        case = CASES["convolution, batch norm"]
        run, _ = distributed(case)
        for step in run.steps(case.dataset(), epochs=1):
            for x, y in step:
                x.requires_grad_(True)
                out = checkpoint(run.model, x, use_reentrant=reentrant) if recompute else run.model(x)
                step.backward(F.cross_entropy(out, y))
        return run.digest()

    assert run_team(1, lambda: job(True)) == run_team(1, lambda: job(False))
    assert run_team(2, lambda: job(True)) == run_team(2, lambda: job(False))


def test_a_worker_that_is_stopped_for_a_while_is_waited_for_and_not_blamed() -> None:
    def job() -> str:
        run = tiny_run()
        other = run._team.board.pid(1)

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
