"""Epochs are counted over the run, however its loops are written; and a resumed run is one that never stopped.

Each way of writing is run whole; and ended at a number of places (in mid-epoch, between epoch and evaluation, in the
evaluation, after an epoch, after the last), to go on with another number of workers. What is compared: loss, learning
rate and digest after each step, and which code was run after an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import lightwork
from lightwork.errors import CheckpointError, UsageError
from tests.fake_ranks import run_ranks
from tests.training import Numbered, new_folder, tiny_run

NUM_EPOCHS, NUM_STEPS = 4, 3


class Ended(Exception):
    """The process ends here."""


def inputs(num: int = 20, shift: float = 0.0) -> TensorDataset:
    return TensorDataset(torch.randn(num, 3, generator=torch.Generator().manual_seed(4)) + shift)


class Script:
    """One process of a script: what it does, noted; it ends at a place."""

    def __init__(self, folder: Path, *, ends_at: str = "", resumes: bool = False) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.7)
        self.folder, self.ends_at = folder, ends_at
        resume = folder / "saved" if resumes else None
        self.run = lightwork.distribute(
            model, self.optimizer, global_batch=8, micro_batch=2, run_dir=new_folder(), resume=resume
        )
        self.run.keep(scheduler=self.scheduler, best=100.0)
        self.notes: list[Any] = []
        self.data = inputs()

    def reach(self, place: str) -> None:
        if place == self.ends_at:
            raise Ended

    def train(self, steps: Iterator[lightwork.Step]) -> None:
        for step in steps:
            for (x,) in step:
                step.backward(self.run.model(x).square().mean())
            rate = self.optimizer.param_groups[0]["lr"]
            self.notes.append((step.index, step.epoch, step.loss, rate, self.run.digest(), step.last_of_epoch))
            self.run.save(self.folder / "saved")
            self.reach(f"step {step.index}")

    def after_epoch(self, epoch: int) -> None:
        self.reach(f"before evaluation {epoch}")
        with self.run.evaluate(self.data) as ev:
            for (x,) in ev:
                self.reach(f"evaluation {epoch}")
                ev.add("loss", self.run.model(x).square().mean())
        self.scheduler.step()
        self.run.keep(best=min(self.run.kept["best"], ev["loss"]))
        self.notes.append(("after", epoch, ev["loss"], self.run.kept["best"]))
        self.run.save(self.folder / "saved")
        self.reach(f"saved {epoch}")
        self.reach(f"after {epoch}")


def by_run_epochs(script: Script) -> None:
    for epoch in script.run.epochs(NUM_EPOCHS):
        script.train(script.run.steps(script.data))
        script.after_epoch(epoch)


def by_range_from_the_place(script: Script) -> None:
    for epoch in range(script.run.epoch, NUM_EPOCHS):
        script.train(script.run.steps(script.data, epochs=1))
        script.after_epoch(epoch)


def by_range(script: Script) -> None:
    for epoch in range(NUM_EPOCHS):
        script.train(script.run.steps(script.data, epochs=1))
        script.after_epoch(epoch)


def by_one_loop(script: Script) -> None:
    script.train(script.run.steps(script.data, epochs=NUM_EPOCHS))
    script.run.save(script.folder / "model")


def by_several_data_sets(script: Script) -> None:
    other = inputs(16, shift=1.0)
    for epoch in script.run.epochs(NUM_EPOCHS):
        script.train(script.run.steps(script.data))
        script.train(script.run.steps(other, max_steps=1))
        script.after_epoch(epoch)


def by_two_loops_over_epochs(script: Script) -> None:
    for epoch in script.run.epochs(2):
        script.train(script.run.steps(script.data))
        script.after_epoch(epoch)
    for epoch in script.run.epochs(2):
        script.train(script.run.steps(inputs()))  # made anew
        script.after_epoch(epoch)


WAYS = {
    "run.epochs": by_run_epochs,
    "range(run.epoch, E)": by_range_from_the_place,
    "one loop": by_one_loop,
    "several data sets": by_several_data_sets,
    "two loops over run.epochs": by_two_loops_over_epochs,
}

PLACES = ["step 4", "step 5", "before evaluation 1", "evaluation 1", "saved 1", "evaluation 3", "saved 3", "the end"]

#: Where a script comes by that has no such code, or not so many epochs.
PLACES_OF = {"one loop": ["step 4", "step 5", "the end"], "two loops over run.epochs": [*PLACES[:5], "the end"]}


def notes_of(way: Any, num_workers: int, folder: Path, **options: Any) -> list[Any]:
    def job() -> list[Any]:
        script = Script(folder, **options)
        try:
            way(script)
        except Ended:
            pass
        else:
            script.notes.append(("end", script.run.digest(), script.scheduler.last_epoch))
        script.run.close(gives_back=False)  # as at the end of a process
        return script.notes

    results = run_ranks(num_workers, job, seed=num_workers)
    assert results == [results[0]] * num_workers
    return results[0]


@pytest.mark.parametrize(("way", "place"), [(way, place) for way in WAYS for place in PLACES_OF.get(way, PLACES)])
def test_a_run_that_goes_on_is_one_that_never_stopped(way: str, place: str) -> None:
    whole = notes_of(WAYS[way], 1, new_folder())
    folder = new_folder()
    first = notes_of(WAYS[way], 2, folder, ends_at=place)
    second = notes_of(WAYS[way], 3, folder, resumes=True)
    assert (first[-1][0] == "end") == (place == "the end")
    if place == "the end" and way == "range(run.epoch, E)":
        first = first[:-2]  # its last code runs again, for only run.close() would say that it has ended
    elif place == "the end":
        first = first[:-1]
    if place.startswith("saved"):
        # Ended before the code after the epoch had: it runs again, whole, with the same outcome.
        assert second[0] == first[-1]
        first = first[:-1]
    assert first + second == whole


def test_code_after_an_epoch_that_has_ended_does_not_run_again() -> None:
    whole, folder = notes_of(by_run_epochs, 1, new_folder()), new_folder()
    first = notes_of(without_saves_in_steps, 2, folder, ends_at="step 7")
    second = notes_of(without_saves_in_steps, 1, folder, resumes=True)
    assert [note for note in first if note[0] == "after"] + [n for n in second if n[0] == "after"] == [
        note for note in whole if note[0] == "after"
    ]
    assert second[-1] == whole[-1]


def without_saves_in_steps(script: Script) -> None:
    for epoch in script.run.epochs(NUM_EPOCHS):
        for step in script.run.steps(script.data):
            for (x,) in step:
                step.backward(script.run.model(x).square().mean())
            script.reach(f"step {step.index}")
        script.after_epoch(epoch)


@pytest.mark.parametrize("place", ["step 1", "step 2", "step 4", "evaluation 1", "saved 0", "saved 2"])
def test_range_over_epochs_is_right_in_the_first_one_and_refused_behind_it(place: str) -> None:
    whole, folder = notes_of(by_range, 1, new_folder()), new_folder()
    first = notes_of(by_range, 2, folder, ends_at=place)
    if place in ("step 1", "step 2"):
        assert first + notes_of(by_range, 1, folder, resumes=True) == whole
        return
    if place == "saved 0":  # at the end of the first loop, from where its code runs again
        assert first[:-1] + notes_of(by_range, 1, folder, resumes=True) == whole
        return
    with pytest.raises(UsageError, match=r"for epoch in run\.epochs\(E\):"):
        notes_of(by_range, 1, folder, resumes=True)


def test_a_range_from_a_number_of_the_scripts_own_is_refused() -> None:
    folder = new_folder()
    notes_of(by_run_epochs, 1, folder, ends_at="step 7")

    def from_two(script: Script) -> None:
        print(f"goes on at {script.run.epoch}, step {script.run.step_index}")  # printing is not using
        for _ in range(2, NUM_EPOCHS):
            script.train(script.run.steps(script.data))

    with pytest.raises(UsageError, match="goes on after 8 steps, in epoch 2"):
        notes_of(from_two, 1, folder, resumes=True)


def test_a_script_may_be_rewritten_with_run_epochs_and_go_on() -> None:
    whole, folder = notes_of(by_range, 1, new_folder()), new_folder()
    first = notes_of(by_range, 2, folder, ends_at="step 7")
    assert first + notes_of(by_run_epochs, 1, folder, resumes=True) == whole


def test_a_while_loop_goes_on() -> None:
    def way(script: Script) -> None:
        while script.run.step_index < 10:
            script.train(script.run.steps(script.data))
            script.scheduler.step()

    whole, folder = notes_of(way, 1, new_folder()), new_folder()
    first = notes_of(way, 3, folder, ends_at="step 4")
    assert first + notes_of(way, 2, folder, resumes=True) == whole
    assert [note[1] for note in whole[:-1]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_longer_loop_trains_on() -> None:
    folder = new_folder()
    whole = notes_of(by_one_loop, 1, new_folder())

    def two_epochs(script: Script) -> None:
        script.train(script.run.steps(script.data, epochs=2))

    first = notes_of(two_epochs, 1, folder)
    assert first[:-1] + notes_of(by_one_loop, 2, folder, resumes=True) == whole


def seen_by(loops: Any) -> list[tuple[int, list[float]]]:
    """Return epoch, and ids with augmentation of each step."""

    def job() -> list[tuple[int, list[float]]]:
        run = tiny_run()
        seen = []
        for step in loops(run):
            for ids, x in step:
                step.backward(run.model(x).mean())
                step.gather("rows", torch.cat([ids[:, None].float(), x], 1))
            seen.append((step.epoch, step["rows"].flatten().tolist()))
        run.close()
        return seen

    (seen,) = run_ranks(1, job)
    return seen


def test_epochs_are_the_same_however_the_loops_are_written() -> None:
    data = Numbered(16)
    expected = seen_by(lambda run: run.steps(data, epochs=3))
    assert [epoch for epoch, _ in expected] == [0, 0, 1, 1, 2, 2]
    assert len({str(rows) for _, rows in expected}) == 6
    ways = [
        lambda run: (step for _ in range(3) for step in run.steps(data, epochs=1)),
        lambda run: (step for _ in run.epochs(3) for step in run.steps(data)),
        lambda run: (step for _ in range(3) for step in run.steps(DataLoader(data, shuffle=True, batch_size=8))),
        lambda run: (step for _ in range(3) for step in run.steps(Numbered(16))),  # made anew, as a file is read again
        lambda run: (step for _ in range(3) for step in run.steps(data, max_steps=2)),
    ]
    for way in ways:
        assert seen_by(way) == expected


def test_another_data_set_begins_at_its_first_epoch_and_a_list_is_known_again() -> None:
    one, other = Numbered(16), Numbered(12)
    epochs = [
        epoch
        for epoch, _ in seen_by(lambda run: (step for data in (one, other, one, other) for step in run.steps(data)))
    ]
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1]

    def job() -> list[int]:
        run = tiny_run()
        found = []
        for _ in range(2):
            for step in run.steps([torch.ones(3) * i for i in range(8)]):
                for x in step:
                    step.backward(run.model(x).mean())
                found.append(step.epoch)
        run.close()
        return found

    assert run_ranks(2, job) == [[0, 1]] * 2


def test_a_loop_says_how_long_it_is() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from torch.ones(20, 3)

    def job() -> None:
        run = tiny_run()
        data = inputs()
        assert len(run.steps(data)) == 3  # type: ignore[arg-type]
        assert len(run.steps(data, epochs=2)) == 6  # type: ignore[arg-type]
        assert len(run.steps(data, epochs=2, max_steps=4)) == 4  # type: ignore[arg-type]
        assert len(run.steps(Stream(), max_steps=4)) == 4  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not known before it is read"):
            len(run.steps(Stream()))  # type: ignore[arg-type]
        lasts = []
        for step in run.steps(Stream(), epochs=2):
            for x in step:
                step.backward(run.model(x).mean())
            lasts.append((step.epoch, step.last_of_epoch))
        assert lasts == [(0, False), (0, False), (0, True), (1, False), (1, False), (1, True)]
        run.close()

    run_ranks(2, job)


class Fresh(Dataset[Any]):
    """Numbers, some other way."""

    def __init__(self, num: int, shift: float) -> None:
        self.rows = inputs(num, shift).tensors[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return (self.rows[index],)


SAMPLER = RandomSampler(range(20), generator=torch.Generator().manual_seed(3))

OTHER_DATA: dict[str, tuple[Any, dict[str, Any], str]] = {
    "longer": (lambda: inputs(24), {}, "samples in the data set: 24, was 20"),
    "shorter": (lambda: inputs(16), {}, "samples in the data set: 16, was 20"),
    "of another type": (lambda: Fresh(20, 0.0), {}, "kind of data set: Fresh, was TensorDataset"),
    "with other content": (lambda: inputs(20, 1.0), {}, "content of some samples"),
    "not shuffled": (inputs, {"shuffle": False}, "order of the samples"),
    "in another order": (inputs, {"order": list(range(19, -1, -1))}, "order of the samples"),
}


@pytest.mark.parametrize("way", ["run.epochs", "one loop"])
@pytest.mark.parametrize("place", ["step 4", "step 5"])
@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_are_refused(name: str, place: str, way: str) -> None:
    make, settings, message = OTHER_DATA[name]
    folder = new_folder()
    notes_of(WAYS[way], 1, folder, ends_at=place)

    def other(script: Script) -> None:
        if way == "run.epochs":
            for _ in script.run.epochs(NUM_EPOCHS):
                script.train(script.run.steps(make(), **settings))
        else:
            script.train(script.run.steps(make(), epochs=NUM_EPOCHS, **settings))

    with pytest.raises(CheckpointError, match=message):
        notes_of(other, 2, folder, resumes=True)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
}


@pytest.mark.parametrize("order", ["made and kept after", "made before"])
@pytest.mark.parametrize("late_save", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_by_step_ends_right(name: str, late_save: bool, order: str) -> None:
    folder = new_folder()

    def job(stop: int | None, resume: Path | None) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[name](optimizer) if order == "made before" else None
        run = lightwork.distribute(model, optimizer, global_batch=4, run_dir=new_folder(), resume=resume)
        scheduler = scheduler or SCHEDULERS[name](optimizer)
        run.keep(scheduler=scheduler)
        rates = []
        for step in run.steps(inputs(32)):
            rates.append(optimizer.param_groups[0]["lr"])
            for (x,) in step:
                step.backward(model(x).mean())
            if not late_save and step.index == 3:
                run.save(folder)  # what follows in this body is added to it
            scheduler.step()
            if late_save and step.index == 3:
                run.save(folder)
            if step.index == stop:
                break
        run.close(gives_back=False)
        return rates

    (whole,) = run_ranks(1, lambda: job(None, None))
    run_ranks(2, lambda: job(4, None))
    assert whole[4:] == run_ranks(1, lambda: job(None, folder))[0]


def test_a_scheduler_that_is_not_kept_is_named() -> None:
    folder = new_folder()
    notes_of(by_one_loop, 1, folder, ends_at="step 4")

    def sets_it_anew(script: Script) -> None:
        script.optimizer.param_groups[0]["lr"] = 0.05
        script.train(script.run.steps(script.data, epochs=NUM_EPOCHS))

    with pytest.raises(UsageError, match=r"lr of group 0: 0\.05, was 0\.1.*run\.keep\(scheduler=scheduler\)"):
        notes_of(sets_it_anew, 1, folder, resumes=True)


def test_plain_values_are_kept_with_their_types() -> None:
    folder = new_folder()
    values = {
        "best": 0.5,
        "epoch": 3,
        "name": "x",
        "nothing": None,
        "rows": (1, [2.0]),
        "by number": {1: torch.ones(2)},
    }

    def saves() -> None:
        run = tiny_run()
        run.keep(**values)
        run.save(folder / "c")
        with pytest.raises(UsageError, match=r"run\.keep\(bad=\.\.\.\)"):
            run.keep(bad=object())
        run.close()

    def goes_on() -> dict[str, Any]:
        run = tiny_run(resume=folder / "c")
        assert run.kept["epoch"] == 3
        run.keep(best=0.0)  # a declaration, until the loops begin
        found = dict(run.kept)
        for step in run.steps(inputs()):
            for (x,) in step:
                step.backward(run.model(x).mean())
            run.keep(best=0.25)
        assert run.kept["best"] == 0.25
        run.save(folder / "d")
        run.close()
        return found

    run_ranks(1, saves)
    (found,) = run_ranks(1, goes_on)
    assert found.pop("by number")[1].tolist() == values.pop("by number")[1].tolist()
    assert found == values
    kept = lightwork.load(folder / "d").kept
    assert (kept["best"], kept["epoch"]) == (0.25, 3)


def test_what_cannot_run_again_is_refused_when_it_did_not_end() -> None:
    folder = new_folder()

    def way(script: Script) -> None:
        for _ in script.run.epochs(2):
            script.train(script.run.steps(script.data))
            with script.run.edit():
                script.run.model[0].weight.mul_(0.5)
            script.run.save(folder / "saved")
            script.reach("behind the edit")

    notes_of(way, 1, folder, ends_at="behind the edit")
    with pytest.raises(CheckpointError, match=r"behind run\.edit\(\)"):
        notes_of(way, 1, folder, resumes=True)


def test_the_order_of_an_epoch_is_asked_for_once() -> None:
    asked: list[int] = []

    def order(epoch: int) -> list[int]:
        asked.append(epoch)
        return list(range(20))

    def job() -> None:
        run = tiny_run()
        for step in run.steps(inputs(), epochs=5, order=order):
            for (x,) in step:
                step.backward(run.model(x).mean())
        run.close()

    run_ranks(1, job)
    in_the_loop = asked[asked.index(4) + 1 :] if 4 in asked else asked  # behind the count of all steps
    assert in_the_loop.count(0) <= 1
    assert in_the_loop.count(3) <= 1
