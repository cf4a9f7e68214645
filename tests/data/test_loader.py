"""Loading ahead: whoever loads, and whatever becomes of the predictions, the batches are those of loading on demand."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset, get_worker_info
from torch.utils.data._utils import worker

from lightwork.data.batch import tensors
from lightwork.data.loader import Loader
from lightwork.data.source import source_of
from lightwork.errors import DataError
from lightwork.spec.roster import Roster


def bits(batch) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors(batch)]


def plan_of(order, num_epochs=2, rank=0, world_size=1):
    """Yield the positions that fall to a rank."""
    for epoch in range(num_epochs):
        for step in range(order.num_steps(epoch)):
            for index in Roster.of_sizes((world_size,)).share(rank, order.micro_batches(epoch, step)):
                yield epoch, step, index


def opened(data, upcoming=None, **sizes) -> Loader:
    source = source_of(data, seed=5)
    order = source.order(**({"global_batch": 10, "micro_batch": 3} | sizes))
    return Loader(source, order, plan_of(order) if upcoming is None else upcoming)


def everything(data) -> list[tuple[tuple[int, int, int], list[bytes]]]:
    source = source_of(data, seed=5)
    order = source.order(global_batch=10, micro_batch=3)
    loader = Loader(source, order, plan_of(order))
    result = [(position, bits(loader.get(*position))) for position in plan_of(order)]
    loader.close()
    return result


def random_collate(samples):
    noise = torch.stack([sample["noise"] for sample in samples])
    return noise + torch.rand(()) + np.random.rand() + random.random(), torch.get_num_threads()


@pytest.mark.parametrize("collate", [None, random_collate])
def test_loading_workers_give_the_bytes_of_loading_inline(augmented, collate):
    inline = everything(DataLoader(augmented, shuffle=True, collate_fn=collate))
    assert everything(DataLoader(augmented, shuffle=True, collate_fn=collate, num_workers=2)) == inline
    assert len({str(batch) for _, batch in inline}) == len(inline)


def test_loading_workers_that_are_spawned_give_the_same_bytes(augmented):
    spawned = DataLoader(augmented, shuffle=True, num_workers=1, multiprocessing_context="spawn")
    assert everything(spawned) == everything(augmented)


def test_the_random_state_of_the_script_does_not_reach_the_loading_workers(augmented):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = everything(DataLoader(augmented, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before), "nor is it moved by starting them"
    torch.manual_seed(2)
    assert everything(DataLoader(augmented, num_workers=1)) == first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stolen_and_lost_micro_batches_change_no_byte(augmented, num_workers):
    """Rank 0 of 3 loses some of its own micro-batches, and takes some of the others', one of them twice."""
    loader = DataLoader(augmented, shuffle=True, num_workers=num_workers)
    source = source_of(loader, seed=5)
    order = source.order(global_batch=12, micro_batch=1)
    asked = [
        (0, 0, 0),
        (0, 0, 3),
        (0, 0, 11),
        (0, 0, 10),
        (0, 0, 1),
        (0, 1, 2),
        (0, 1, 2),
        (1, 0, 0),
        (1, 1, 9),
        (1, 1, 3),
    ]
    ours = Loader(source, order, plan_of(order, rank=0, world_size=3))
    for position in asked:
        expected = source.fetch(position[0], order.micro_batch_ids(*position))
        assert bits(ours.get(*position)) == bits(expected)
        ours.idle()
    ours.close()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_mixture_of_getting_and_idling_gives_the_same_batches(data):
    numbers = TensorDataset(torch.arange(40))
    source = source_of(numbers, seed=1)
    order = source.order(global_batch=9, micro_batch=2)
    positions = list(plan_of(order))
    predicted = data.draw(st.lists(st.sampled_from(positions), unique=True).map(sorted))
    asked = data.draw(st.lists(st.sampled_from(positions)))
    loader = Loader(source, order, predicted)
    for position in asked:
        for _ in range(data.draw(st.integers(0, 3))):
            loader.idle()
        assert loader.get(*position)[0].tolist() == order.micro_batch_ids(*position).tolist()


class Counted(TensorDataset):
    """Remembers which ids were fetched."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(torch.arange(num_samples))
        self.fetched: list[int] = []

    def __getitem__(self, index):
        self.fetched.append(index)
        return super().__getitem__(index)


def test_idling_loads_a_bounded_number_ahead_once_each():
    data = Counted(40)
    loader = opened(DataLoader(data), global_batch=4, micro_batch=2)
    loader.get(0, 0, 0), loader.get(0, 0, 1)
    assert data.fetched == [0, 1, 2, 3]
    assert [loader.idle() for _ in range(4)] == [True, True, False, False]
    assert data.fetched == list(range(8))
    assert loader.get(0, 1, 0)[0].tolist() == [4, 5]
    assert data.fetched == list(range(8)), "it came from what was loaded ahead"
    assert loader.idle()


def test_idling_does_not_load_what_is_left_of_the_step_that_is_waited_for():
    data = Counted(40)
    loader = opened(DataLoader(data), global_batch=8, micro_batch=2)
    loader.get(0, 0, 0)
    assert loader.idle()
    assert data.fetched == [0, 1, 8, 9]


def test_idling_ends_when_nothing_is_predicted():
    loader = opened([1, 2, 3], upcoming=())
    assert not loader.idle()
    assert loader.get(0, 0, 0).tolist() != []


def test_predictions_may_be_endless(augmented):
    def forever():
        epoch = 0
        while True:
            yield epoch, 0, 0
            epoch += 1

    for num_workers in (0, 1):
        loader = opened(DataLoader(augmented, num_workers=num_workers), upcoming=forever())
        assert loader.get(30, 0, 0)["id"].tolist() == [0, 1, 2]
        loader.idle()
        loader.close()


class Logged:
    """Writes down in a file which ids were fetched, by whichever process."""

    def __init__(self, path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> int:
        with self.path.open("a") as log:
            log.write(f"{index}\n")
        return index


def test_what_the_run_has_passed_is_not_loaded_any_more(tmp_path):
    data = Logged(tmp_path / "log")
    loader = opened(DataLoader(data, num_workers=1), global_batch=2, micro_batch=1)
    loader.get(0, 0, 0)
    for step in range(50, 54):
        assert loader.get(0, step, 1).tolist() == [2 * step + 1]
    loader.close()
    fetched = [int(line) for line in data.path.read_text().split()]
    assert [index for index in fetched if 10 < index < 100] == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_aligned(num_workers):
    loader = opened(DataLoader(list(range(30)), collate_fn=shifted, num_workers=num_workers))
    for position in ((0, 0, 0), (0, 1, 0)):
        assert loader.get(*position).data_ptr() % 64 == 0
    loader.close()


def shifted(samples):
    return torch.tensor([0, *samples])[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_sample_is_named_when_it_is_asked_for_and_not_before(failing, num_workers):
    loader = opened(DataLoader(failing(5, ValueError("truncated file")), num_workers=num_workers))
    loader.get(0, 0, 0)
    loader.idle()
    with pytest.raises(DataError, match=r"sample 5 of the data set Failing .* ValueError: truncated file") as caught:
        loader.get(0, 0, 1)
    loader.idle()
    if num_workers:
        assert "In the loading worker:" in str(caught.value)
        assert "in __getitem__" in str(caught.value)
    assert loader.get(0, 0, 2)["id"].tolist() == [6, 7, 8]
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_sample_that_another_worker_took_fails_nothing_here(failing, num_workers):
    loader = opened(DataLoader(failing(5, ValueError("truncated file")), num_workers=num_workers))
    for position in ((0, 0, 0), (0, 0, 2), (0, 0, 3), (0, 1, 0)):
        loader.idle()
        loader.get(*position)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_impossible_next_epoch_is_an_error_when_it_is_reached(augmented, num_workers):
    source = source_of(DataLoader(augmented, num_workers=num_workers), seed=0, order=lambda epoch: [0] * (1 - epoch))
    order = source.order(global_batch=1, micro_batch=1)
    loader = Loader(source, order, plan_of(order))
    loader.get(0, 0, 0)
    loader.idle()
    with pytest.raises(DataError, match="order of epoch 1 holds no ids"):
        loader.get(1, 0, 0)
    loader.close()


def test_a_loading_worker_that_is_killed_is_an_error_with_a_hint():
    loader = opened(DataLoader([1, 2, 3] * 10, num_workers=1, worker_init_fn=end_soon))
    # torch may notice by the signal of a child's end too, in the middle of anything.
    with pytest.raises((DataError, RuntimeError), match=r"num_workers=0|DataLoader worker .* is killed"):
        [loader.get(0, 0, index) for index in range(4)]
    loader.close()


def end_soon(worker_id: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_closing_ends_the_loading_workers(augmented):
    before = set(multiprocessing.active_children())
    loader = opened(DataLoader(augmented, num_workers=2))
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.get(0, 0, 0)
    loader.close()
    assert set(multiprocessing.active_children()) == before
    assert loader.get(0, 0, 1)["id"].tolist() == [3, 4, 5], "what is asked for later is loaded here"
    loader.close()


def test_loading_workers_end_when_the_training_process_is_killed(augmented, tmp_path):
    training = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(augmented, tmp_path))
    training.start()
    while not (tmp_path / "pids").exists():
        time.sleep(0.01)
    training.kill()
    training.join()
    training.close()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


def train_until_killed(data, folder) -> None:
    worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds between a loading worker's looks at its parent; 5 else
    loader = opened(DataLoader(data, num_workers=2))
    loader.get(0, 0, 0)
    (folder / "writing").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    (folder / "writing").rename(folder / "pids")
    time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Opened:
    """A data set whose loading workers open a file of their own."""

    handle = "none"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> str:
        return self.handle


def open_handle(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Opened)
    info.dataset.handle = f"opened by {worker_id}"


def test_the_loaders_init_function_sees_the_users_data_set():
    loader = opened(DataLoader(Opened(), num_workers=1, worker_init_fn=open_handle))
    assert loader.get(0, 0, 0) == ["opened by 0"] * 3
    loader.close()
