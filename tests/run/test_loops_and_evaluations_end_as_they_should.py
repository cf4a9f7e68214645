"""Loops over steps that follow each other, evaluations with loading workers, and what clipping costs: in real teams."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.spec.tree import sum_of
from tests.training import Numbered, new_folder, run_team, tiny_run


class Loaded(Dataset[Any]):
    """Samples that know who loaded them."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> tuple[int, int, torch.Tensor]:
        return index, os.getpid(), torch.rand(3)


def evaluated(num_workers: int) -> tuple[list[int], list[int], int, int, float]:
    """Return the ids that came here, how many each loaded, the first by itself; processes then and after; a mean."""

    def children() -> int:
        return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    run = tiny_run()
    ids, loaders, before, meanwhile = [], Counter({os.getpid(): 0}), children(), 0
    with run.evaluate(DataLoader(Loaded(), num_workers=num_workers, prefetch_factor=2 if num_workers else None)) as ev:
        for sample, loader, x in ev:
            meanwhile = max(meanwhile, children() - before)
            ids += sample.tolist()
            loaders.update(loader.tolist())
            ev.add("mean", run.model(x).mean())
    return ids, list(loaders.values()), meanwhile, children() - before, ev["mean"]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_loading_workers_load_all_of_an_evaluation_and_end_with_it(num_workers: int) -> None:
    plain = run_team(1, lambda: evaluated(0))[0]
    results = run_team(num_workers, lambda: evaluated(2))
    assert sorted(i for ids, *_ in results for i in ids) == list(range(44)), "each sample once"
    for ids, loaders, meanwhile, after, mean in results:
        assert mean == plain[-1]
        assert after == 0
        if ids:
            assert meanwhile == 2
            assert loaders[0] == 0
            assert min(loaders[1:]) > 0
        if len(ids) > 2:  # more than one batch: the others may have left it no more
            assert len(loaders) == 1 + 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loading_workers_leave_half_of_an_evaluation_to_be_claimed_by_whoever_is_fast() -> None:
    def job() -> int:
        run = tiny_run()
        batches = 0
        with run.evaluate(DataLoader(Loaded(), num_workers=8, prefetch_factor=4)) as ev:
            for _ in ev:
                time.sleep(0.1 if run.rank else 0.0)
                batches += 1
        return batches

    fast, slow = run_team(2, job)
    assert fast + slow == 22
    assert 1 <= slow <= 8, "as many as are claimed ahead, and few more"


def test_an_evaluation_is_iterated_inside_its_with() -> None:
    def job() -> str:
        with pytest.raises(lightwork.UsageError) as caught:
            list(tiny_run().evaluate(Numbered(4)))
        return str(caught.value)

    assert "outside its `with`" in run_team(1, job)[0]


def test_a_loop_may_follow_one_that_was_left_while_its_iterator_is_kept() -> None:
    def job() -> tuple[list[int], str, str]:
        run = tiny_run()
        loops, indices = [], []
        for _ in range(3):
            loop = run.steps(Numbered(64), epochs=20)
            loops.append(loop)  # so that it is not closed as an iterator that nobody holds
            for step in loop:
                for _, x in step:
                    step.backward(run.model(x).mean())
                indices.append(step.index)
                if step.index % 3 == 2:
                    break
        run.save(run.run_dir / "end")
        with pytest.raises(lightwork.UsageError) as caught:
            next(loops[0])
        return indices, str(caught.value), run.digest()

    (alone,) = run_team(1, job)
    assert alone[0] == list(range(9))
    assert "goes on after another call of run.steps has ended it" in alone[1]
    assert run_team(2, job) == [alone] * 2


def test_a_loop_that_goes_on_after_an_inner_one_is_told_so() -> None:
    def job() -> str:
        run = tiny_run()
        for step in run.steps(Numbered(64), epochs=20):
            for _, x in step:
                step.backward(run.model(x).mean())
            for inner in run.steps(Numbered(16), epochs=1):
                for _, x in inner:
                    inner.backward(run.model(x).mean())
        return "not reached"

    results = fork_team(2, job, timeout=60.0)
    text = "goes on after another call of run.steps has ended it"
    assert all(result.error for result in results)
    assert any(text in (result.error or "") for result in results)  # the first ends the others


@pytest.mark.parametrize("limit", [1e9, 1e-9])
def test_what_is_derived_of_a_step_is_not_derived_again_for_every_bucket_where_nothing_is_clipped(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job() -> tuple[int, int]:
        made = []
        monkeypatch.setattr("lightwork.engine.update.sum_of", lambda *args: (made.append(1), sum_of(*args))[1])
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        run = lightwork.distribute(
            model, optimizer, global_batch=8, micro_batch=2, run_dir=new_folder(), clip_grad_norm=limit
        )
        for step in run.steps([torch.ones(512)] * 24, epochs=1):
            for x in step:
                step.backward(model(x).mean())
        return len(made), len(run._engine.state.weights.layout.buckets)

    ((made, num_buckets),) = run_team(1, job)
    assert num_buckets > 3
    assert made == 3  # once in each step, not for each bucket


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_step_that_was_left_in_its_middle_is_named_and_never_waited_for(num_workers: int) -> None:
    def job() -> list[str]:
        run, said = tiny_run(), []
        try:
            for step in run.steps(Numbered(44), max_steps=3):
                for _ in step:
                    raise KeyError("a mistake in user code")
        except KeyError:
            pass
        for call in (lambda: next(run.steps(Numbered(44), max_steps=3)), run.save, run.digest):
            with pytest.raises(lightwork.UsageError) as told:
                call()
            said.append(str(told.value))
        return said

    for said in run_team(num_workers, job, timeout=30):
        for text in said:
            assert "after step 0 was left in its middle" in text
            assert "resume=" in text


def test_a_closed_run_has_no_steps() -> None:
    def job() -> None:
        run = tiny_run()
        run.close()
        with pytest.raises(lightwork.UsageError, match=r"after run.close\(\). Call lightwork.distribute"):
            next(run.steps(Numbered(44)))

    run_team(1, job)
