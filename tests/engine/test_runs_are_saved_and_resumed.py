"""Resuming at a step gives the bits of never having stopped; a checkpoint does not depend on the team that wrote it."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightwork
from tests.cases import CASES, Case, vectors
from tests.fake_ranks import run_ranks
from tests.training import alone, distributed, new_folder

NAMES = [
    "gpt, tied, dropout, token weights",
    "convolution, bf16",
    "lstm, SGD",
    "Adafactor",
    "unknown optimizer",
    "experts, SGD",
    "buffers",
]


def interrupted(case: Case, folder: Path, stop_after: int) -> list[tuple[float, float, str]]:
    """Train a case, saving after `stop_after` steps and stopping there; or going on from there, if it was saved."""
    resume = folder / "saved" if (folder / "saved").exists() else None
    run, scheduler = distributed(case, resume=resume)
    seen = []
    for step in run.steps(case.dataset(), epochs=case.epochs):
        for batch in step:
            loss, weight = case.loss(run.model, batch)
            step.backward(loss, weight)
        if scheduler is not None:
            scheduler.step()
        seen.append((step.loss, step.grad_norm, run.digest()))
        if step.index + 1 == stop_after:
            run.save(folder / "saved")
            break
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1)])
def test_a_resumed_run_has_the_digests_of_one_that_never_stopped(name: str, before: int, after: int) -> None:
    case = CASES[name]
    for stop_after in (2, 3):  # in the middle and at the end of an epoch
        folder = new_folder()
        first = run_ranks(before, partial(interrupted, case, folder, stop_after))[0]
        second = run_ranks(after, partial(interrupted, case, folder, 99))[0]
        assert first + second == alone(name)


def test_a_run_directory_with_a_checkpoint_is_gone_on_with() -> None:
    case = CASES["lstm, SGD"]
    folder = str(new_folder())

    def job() -> list[int]:
        run, scheduler = distributed(case, run_dir=folder)
        indices = []
        for step in run.steps(case.dataset(), max_steps=2 + 2 * run.step_index):
            for batch in step:
                step.backward(case.loss(run.model, batch)[0])
            scheduler.step()
            indices.append(step.index)
        run.save()
        return indices

    assert run_ranks(2, job) == [[0, 1]] * 2
    assert run_ranks(1, job) == [[2, 3, 4, 5]]


def test_a_checkpoint_is_a_mapping_that_a_plain_model_loads() -> None:
    case = CASES["gpt, tied, dropout, token weights"]
    folder = new_folder()

    def job() -> dict[str, Any]:
        run, _ = distributed(case)
        for step in run.steps(case.dataset(), max_steps=2):
            for batch in step:
                step.backward(*case.loss(run.model, batch))
        run.save(folder / "model")
        return {name: value.numpy() for name, value in run.state_dict().items()}

    (state,) = run_ranks(1, job)
    checkpoint = lightwork.load(folder / "model")
    model = case.build()
    model.load_state_dict(checkpoint)
    assert checkpoint.step == 2
    assert checkpoint.spec.micro_batch == 2
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    assert sorted(p.name for p in (folder / "model").iterdir()) == [
        "buffers.safetensors",
        "kept.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    assert [p.name for p in folder.iterdir()] == ["model"]


def test_saving_again_replaces_the_checkpoint_and_nothing_else() -> None:
    folder = new_folder()
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("all of it")

    def job() -> str:
        run, _ = distributed(CASES["RMSprop"])
        run.save(folder / "a")
        run.save(folder / "a")
        with pytest.raises(lightwork.CheckpointError, match="exists and is not a checkpoint"):
            run.save(folder / "precious")
        return "went on"

    assert run_ranks(2, job) == ["went on"] * 2
    assert (folder / "precious" / "thesis.txt").read_text() == "all of it"


def saved(case: Case) -> Path:
    folder = new_folder() / "saved"

    def job() -> None:
        run, _ = distributed(case)
        run.save(folder)

    run_ranks(1, job)
    return folder


def test_a_checkpoint_of_another_spec_model_or_optimizer_is_refused() -> None:
    folder = saved(CASES["RMSprop"])

    def job() -> list[str]:
        messages = []
        for build, settings in (
            (lambda: distributed(CASES["RMSprop"], seed=5, resume=folder), "seed is 5, was 0"),
            (lambda: distributed(CASES["unknown optimizer"], resume=folder), "optimizer is"),
        ):
            with pytest.raises(lightwork.CheckpointError) as caught:
                build()
            assert settings in str(caught.value)
            messages.append(str(caught.value))
        model = nn.Linear(20, 5)
        optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
        with pytest.raises(lightwork.CheckpointError, match="another model: only the"):
            lightwork.distribute(model, optimizer, global_batch=16, micro_batch=2, resume=folder, run_dir=new_folder())
        return messages

    run_ranks(1, job)


def test_a_damaged_or_missing_checkpoint_is_named() -> None:
    folder = saved(CASES["RMSprop"])
    with pytest.raises(lightwork.CheckpointError, match="is not a checkpoint"):
        lightwork.load(folder / "nowhere")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(lightwork.CheckpointError, match="is damaged"):
        lightwork.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(lightwork.CheckpointError, match=r"model\.safetensors is missing"):
        lightwork.load(folder)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", ["model", "buffers", "optimizer", "kept", "manifest"])
def test_one_bit_that_is_another_is_found_before_anything_is_taken_from_the_checkpoint(
    name: str, num_workers: int
) -> None:
    folder = saved(CASES["buffers"])
    (path,) = folder.glob(f"{name}.*")
    whole = path.read_bytes()

    def resume() -> None:
        run, _ = distributed(CASES["buffers"])
        before = run.digest()
        with pytest.raises(lightwork.CheckpointError) as error:
            run.load(folder)
        assert f"is damaged: {path.name} " in str(error.value)
        assert run.digest() == before

    generator = random.Random(len(whole))
    for at in (0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(20))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << generator.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(lightwork.CheckpointError, match="is damaged"):
            lightwork.load(folder)
    run_ranks(num_workers, resume)
    path.write_bytes(whole)
    assert len(lightwork.load(folder)) > 0


def test_a_manifest_that_was_edited_is_refused() -> None:
    folder = saved(CASES["RMSprop"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["groups"][0]["lr"] = 0.5
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with pytest.raises(lightwork.CheckpointError, match=r"is damaged: manifest.json \(it is not as it was written"):
        lightwork.load(folder)


def test_an_object_that_needs_pickle_is_refused_and_the_old_checkpoint_kept() -> None:
    folder = new_folder() / "saved"

    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"inner": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    def job() -> None:
        run, _ = distributed(CASES["RMSprop"])
        run.save(folder)
        run.keep(odd=Odd())
        with pytest.raises(
            lightwork.CheckpointError, match=r"odd\.inner is a object, which can not be saved without pickle"
        ):
            run.save(folder)
        with pytest.raises(lightwork.UsageError, match=r"run\.keep\(number=\.\.\.\)"):
            run.keep(number=object())

    run_ranks(2, job)
    assert json.loads((folder / "manifest.json").read_text())["kept"] == {}


def test_the_state_of_an_optimizer_that_trained_before_is_taken_over() -> None:
    def job() -> bool:
        torch.manual_seed(0)
        model = nn.Linear(20, 5)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        inputs, targets = vectors().tensors
        for _ in range(3):
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        twin = nn.Linear(20, 5)
        twin.load_state_dict(model.state_dict())
        other = torch.optim.Adam(twin.parameters(), lr=1e-2, fused=True)
        other.load_state_dict(optimizer.state_dict())
        run = lightwork.distribute(model, optimizer, global_batch=44, micro_batch=44, run_dir=new_folder())
        for step in run.steps(vectors(), shuffle=False):
            for x, y in step:
                step.backward(nn.functional.cross_entropy(model(x), y))
        nn.functional.cross_entropy(twin(inputs), targets).backward()
        other.step()
        return torch.equal(model.weight, twin.weight)

    assert run_ranks(1, job) == [True]


def test_a_loop_that_a_resumed_run_finds_without_a_step_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    folder = new_folder()

    def job(stop_after: int) -> list[int]:
        run, _ = distributed(CASES["RMSprop"], run_dir=str(folder))
        seen = []
        for _ in run.epochs(2):
            for step in run.steps(CASES["RMSprop"].dataset()):
                for batch in step:
                    step.backward(CASES["RMSprop"].loss(run.model, batch)[0])
                seen.append(step.index)
                if step.index == stop_after:
                    run.save()
                    return seen
        return seen

    assert run_ranks(1, partial(job, 1))[0] == [0, 1]
    assert run_ranks(1, partial(job, 2))[0] == [2]  # the last of its epoch
    assert "which has none left" not in capsys.readouterr().err
    assert run_ranks(1, partial(job, 99))[0] == [3, 4, 5]
    assert "saved after step 2, the last of its loop over run.steps, which has none left" in capsys.readouterr().err


def test_a_sum_over_an_epoch_that_is_kept_goes_on_in_its_middle() -> None:
    case = CASES["RMSprop"]

    def job(folder: Path, stop_after: int) -> list[object]:
        run, _ = distributed(case, run_dir=str(folder))
        (optimizer,) = run._engine.optimizers.members
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        run.keep(scheduler=scheduler)
        seen: list[object] = []
        for _ in run.epochs(4):
            run.keep(total=0.0)
            for step in run.steps(case.dataset()):
                for batch in step:
                    step.backward(case.loss(run.model, batch)[0])
                run.keep(total=run.kept["total"] + step.loss)
                seen.append(run.digest())
                if step.index == stop_after:
                    run.save()
                    return seen
            scheduler.step(run.kept["total"])
            seen.append((run.kept["total"], optimizer.param_groups[0]["lr"]))
        return seen

    expected = run_ranks(1, partial(job, new_folder(), 99))[0]
    assert len({rate for _, rate in filter(lambda entry: isinstance(entry, tuple), expected)}) > 1  # type: ignore[misc]
    for stop_after in (1, 2, 4, 8):
        folder = new_folder()
        before = run_ranks(2, partial(job, folder, stop_after))[0]
        assert before + run_ranks(3, partial(job, folder, 99))[0] == expected
