"""`save_every=` saves after so many steps, or so much time, what a run goes on from as if it had not stopped."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.checkpoint import folder as folders
from lightwork.launcher.team import fork_team
from lightwork.run.automatic import Automatic
from tests.training import new_folder, run_team, tiny_run


def train(folder: Path, *, stops_after: int | None = None, leaves: int | None = None, **settings: Any) -> list[Any]:
    """Train 12 steps and return the digests, or be killed behind the body of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(48, 5, generator=generator), torch.randint(3, (48,), generator=generator))
    settings = {"global_batch": 8, "micro_batch": 2, "run_dir": folder, "save_every": 4, **settings}
    run = lightwork.distribute(model, optimizer, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    run.keep(scheduler=scheduler)
    seen = []
    for step in run.steps(data, epochs=2):
        for x, y in step:
            step.backward(nn.functional.cross_entropy(model(x), y))
        scheduler.step()
        seen.append((step.index, run.digest()))
        if step.index == leaves and run.rank == 1:
            break
        if step.index == stops_after:
            run._state.saving.wait()  # what is being written would be lost, and the one before it found
            os.kill(os.getpid(), signal.SIGKILL)
    return seen


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, the newest first."""
    newest = folder / "checkpoint"
    return [lightwork.load(path).step for path in (newest, *folders.older(newest))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_that_is_killed_goes_on_from_the_last_one_to_the_same_bits(num_workers: int) -> None:
    whole = run_team(1, partial(train, new_folder()))[0]
    folder = new_folder()
    results = fork_team(num_workers, partial(train, folder, stops_after=9))
    assert {result.status for result in results} == {-signal.SIGKILL}
    assert steps_in(folder) == [8, 4]
    for seen in run_team(2, partial(train, folder)):
        assert seen == whole[8:]
    assert steps_in(folder) == [12, 8]


def test_as_many_stay_as_are_asked_for() -> None:
    folder = new_folder()
    run_team(2, partial(train, folder, save_every="2 steps", keep_checkpoints=4))
    assert steps_in(folder) == [12, 10, 8, 6]
    run_team(1, partial(train, folder, keep_checkpoints=1))
    assert steps_in(folder) == [12, 10, 8, 6], "no step was left, and nothing saved"


def test_the_time_is_that_of_the_main_worker_and_all_save_after_the_same_step() -> None:
    folder = new_folder()

    def job() -> list[Any]:
        if lightwork.rank():  # another worker's clock says nothing
            Automatic.wish = property(lambda self: 0)  # type: ignore[assignment]
        return train(folder, save_every="0.001s", keep_checkpoints=99)

    start = time.monotonic()
    run_team(2, job)
    assert len(steps_in(folder)) > 3
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_worker_that_leaves_its_loop_where_the_others_would_save_is_not_waited_for(num_workers: int) -> None:
    folder = new_folder()
    run_team(num_workers, partial(train, folder, leaves=7))
    assert steps_in(folder) == [4]


@pytest.mark.parametrize("damage", ["a bit", "a file", "the manifest", "half a file"])
def test_where_the_newest_is_damaged_the_one_before_it_is_taken(damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = run_team(1, partial(train, new_folder()))[0]
    folder = new_folder()
    fork_team(1, partial(train, folder, stops_after=9))
    file = folder / "checkpoint" / ("manifest.json" if damage == "the manifest" else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "a file":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "half a file" else content)
    for seen in run_team(2, partial(train, folder)):
        assert seen == whole[4:]
    said = capfd.readouterr().err
    assert "The one before it is tried." in said
    assert "resumed after 4 steps, from" in said
    assert steps_in(folder)[0] == 12
    assert (folder / "checkpoint.damaged").exists()


def test_where_none_is_sound_the_run_does_not_begin_anew() -> None:
    folder = new_folder()
    fork_team(1, partial(train, folder, stops_after=9))
    for path in (folder / "checkpoint", *folders.older(folder / "checkpoint")):
        (path / "model.safetensors").write_bytes(b"x")
    (result,) = fork_team(1, partial(train, folder))
    assert "DamagedCheckpoint" in str(result.error)


def test_one_that_can_not_be_written_is_told_of_and_training_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    folder = new_folder()
    whole = run_team(1, partial(train, new_folder()))[0]
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "notes.txt").write_text("somebody's own")
    for seen in run_team(2, partial(train, folder)):
        assert seen == whole
    said = capfd.readouterr().err
    assert said.count("no checkpoint was saved, and training goes on: ") == 3, said


@pytest.mark.parametrize("save_every", ["often", "0 steps", "10 parsecs", -3, "1.5 steps"])
def test_a_time_that_is_none_is_refused(save_every: Any) -> None:
    with pytest.raises(lightwork.SpecError, match=r"neither a time nor a number of steps"):
        lightwork.Plan(save_every=save_every)


def test_after_the_death_of_the_main_worker_the_next_one_says_when_to_save() -> None:
    """In a loop in which nobody meets."""
    folder = new_folder()

    def job() -> int:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=folder, save_every="0.05s")
        for step in run.steps(TensorDataset(torch.randn(800, 5)), epochs=1):
            for (x,) in step:
                if run.rank == 0 and step.index == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.002)
                step.backward(model(x).square().mean())
        return int(run.step_index)

    dead, survivor = fork_team(2, job)
    assert dead.status == -signal.SIGKILL
    assert survivor.value == 100, survivor.error
    assert steps_in(folder)[1] > 10


def test_those_that_a_script_puts_elsewhere_are_its_own_affair() -> None:
    folder = new_folder()

    def job() -> None:
        run = tiny_run(run_dir=folder)
        for step in run.steps(TensorDataset(torch.randn(48, 3)), epochs=1):
            for (x,) in step:
                step.backward(run.model(x).square().mean())
            run.save(folder / "mine")
            run.save()

    run_team(2, job)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(("mine", "checkpoint"))) == [
        "checkpoint",
        "checkpoint-000005",
        "mine",
    ]
