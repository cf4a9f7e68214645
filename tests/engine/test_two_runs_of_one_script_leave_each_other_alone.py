"""Several runs in one script, as of a generative adversarial network: own folders, and losses that go through both."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightwork
from lightwork.errors import UsageError
from lightwork.run.folder import RunFolders
from tests.fake_ranks import run_ranks
from tests.training import new_folder

POINTS = torch.randn(32, 2, generator=torch.Generator().manual_seed(3))

Pair = tuple[nn.Module, nn.Module]


def pair(norm: bool = False) -> Pair:
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(16)] if norm else []
    generator = nn.Sequential(nn.Linear(4, 16), *between, nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(2, 16), *[nn.BatchNorm1d(16) for _ in between], nn.Tanh(), nn.Linear(16, 1))
    return generator, critic


def start(model: nn.Module, name: str | None, folder: Path | None = None, **settings: Any) -> lightwork.Run:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    settings = {"global_batch": 8, "micro_batch": 2, "run_dir": folder or new_folder(), **settings}
    return lightwork.distribute(model, optimizer, name=name, **settings)


def adversarial(models: Pair, runs: tuple[lightwork.Run, lightwork.Run]) -> Iterator[tuple[Any, Any]]:
    """Let the two take turns, the generator first: its loss reaches the critic before the critic's first step."""
    generator, critic = models
    both = (run.steps(POINTS, epochs=2) for run in runs)
    for step_g, step_d in zip(*both, strict=True):
        for real in step_g:
            step_g.backward(F.softplus(-critic(generator(torch.randn(len(real), 4)))).mean())
        for real in step_d:
            with torch.no_grad():
                fake = generator(torch.randn(len(real), 4))
            step_d.backward(F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean())
        yield step_g, step_d


def digests(norm: bool = False, **settings: Any) -> tuple[str, str]:
    models = pair(norm)
    runs = start(models[0], "generator", **settings), start(models[1], "critic", **settings)
    for _ in adversarial(models, runs):
        pass
    return runs[0].digest(), runs[1].digest()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": True},
        {"transport": "group", "placement": "zero3"},
        {"activations": "recompute"},
        {"offload": {"optimizer": "disk", "weights": "disk"}},
    ],
    ids=str,
)
def test_any_team_has_the_same_bits(settings: dict[str, Any]) -> None:
    expected = run_ranks(1, lambda: digests(norm=bool(settings.get("norm"))))
    for num_workers in (2, 3):
        assert run_ranks(num_workers, lambda: digests(**settings)) == expected * num_workers


def test_the_gradients_of_a_loss_that_goes_through_another_s_model_are_left_out_there() -> None:
    def by_hand(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def job() -> None:
        models = pair()
        (generator, critic), runs = models, (start(models[0], "generator"), start(models[1], "critic"))
        expected = pair()
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.01, fused=True) for model in expected]
        for step in runs[0].steps(POINTS, max_steps=3):
            state = torch.get_rng_state()
            noises = []
            for real in step:
                noises.append(torch.randn(len(real), 4))
                step.backward(critic(generator(noises[-1])).mean())
            torch.set_rng_state(state)
            by_hand(expected[0])
            for noise in noises:
                (expected[1](expected[0](noise)).mean() / len(noises)).backward()
            optimizers[0].step()
        for model, theirs in zip(models, expected, strict=True):
            for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-7)

    run_ranks(1, job)


def test_buffers_are_those_of_their_own_run_s_steps_and_that_is_said_once() -> None:
    def job() -> tuple[str, list[torch.Tensor]]:
        models = pair(norm=True)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            runs = start(models[0], "generator"), start(models[1], "critic")
            kept = []
            for step in runs[0].steps(POINTS, max_steps=2):
                for real in step:
                    step.backward(models[1](models[0](torch.randn(len(real), 4))).mean())
                kept += [models[1][1].num_batches_tracked.clone(), models[0][1].num_batches_tracked.clone()]
        return said.getvalue(), kept

    (said, kept) = run_ranks(1, job)[0]
    assert [int(count) for count in kept] == [0, 4, 0, 8]
    assert said.count("was written by a forward in a step of another run") == 1
    assert "buffer 1." in said


def test_a_plain_backward_is_refused_all_the_same() -> None:
    def job() -> str:
        models = pair()
        runs = start(models[0], "generator"), start(models[1], "critic")
        step = next(iter(runs[0].steps(POINTS)))
        loss = models[1](POINTS).mean()
        next(iter(step))
        with pytest.raises(UsageError) as error:
            loss.backward()
        return str(error.value)

    assert "Call step.backward(loss) instead" in run_ranks(1, job)[0]


def test_each_has_random_numbers_of_its_own() -> None:
    def job() -> tuple[torch.Tensor, torch.Tensor]:
        models = pair()
        noises = []
        for model, name in zip(models, ("generator", "critic"), strict=True):
            run = start(model, name)
            for batch in next(iter(run.steps(POINTS))):
                noises.append(torch.randn(4))
                del batch
                break
            run._passes._step = None
        return noises[0], noises[1]

    one, other = run_ranks(1, job)[0]
    assert not torch.equal(one, other)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_runs_with_names_have_folders_in_the_run_directory_and_go_on_from_there() -> None:
    out = new_folder()

    def job(num_steps: int) -> tuple[list[str], list[int]]:
        models = pair()
        runs = start(models[0], "generator", out), start(models[1], "critic", out)
        begun = [run.step_index for run in runs]
        for step_g, _ in adversarial(models, runs):
            if step_g.index + 1 == num_steps:
                break
        for run in runs:
            run.save()
        return [run.run_dir.name for run in runs], begun

    assert run_ranks(2, lambda: job(3)) == [(["generator", "critic"], [0, 0])] * 2
    assert (out / "generator/checkpoint").is_dir()
    assert run_ranks(1, lambda: job(5)) == [(["generator", "critic"], [3, 3])]


def test_two_runs_at_once_in_one_folder_are_refused() -> None:
    out = new_folder()

    def job(name: str | None) -> str:
        models = pair()
        first = start(models[0], name, out)
        with pytest.raises(UsageError) as error:
            start(models[1], name, out)
        first.close()
        start(models[1], name, new_folder()).close()
        return str(error.value)

    for name in (None, "critic"):
        assert "two runs at once have the directory" in run_ranks(1, lambda name=name: job(name))[0]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "log", "checkpoint", "3", "a b"])
def test_a_name_that_is_none_for_a_folder_is_refused(name: str) -> None:
    def job() -> str:
        with pytest.raises(UsageError) as error:
            start(pair()[0], name)
        return str(error.value)

    assert f"name={name!r}" in run_ranks(1, job)[0]


def test_a_script_s_second_run_without_a_name_has_a_folder_of_its_own_in_the_launched_one(tmp_path: Path) -> None:
    folders = RunFolders()
    assert [folders.choose(None, tmp_path, None) for _ in range(3)] == [
        (tmp_path, True),
        (tmp_path / "2", True),
        (tmp_path / "3", True),
    ]
    assert folders.choose(None, tmp_path, "critic") == (tmp_path / "critic", True)


def test_named_runs_without_a_directory_share_a_numbered_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = RunFolders()
    chosen = [folders.choose(None, None, name)[0] for name in ("a", "b", None, "c", "a", "b")]
    assert [str(path) for path in chosen] == ["runs/1/a", "runs/1/b", "runs/2", "runs/1/c", "runs/3/a", "runs/3/b"]
