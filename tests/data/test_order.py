"""The order of samples: every sample once an epoch, whatever the sizes; impossible orders are refused."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightwork.data.order import Order
from lightwork.data.source import source_for_evaluation, source_of
from lightwork.errors import DataError, UsageError
from lightwork.spec.roster import Roster


class Numbers(Dataset):
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index


def order_of(data, *, global_batch=4, micro_batch=2, seed=0, **keywords) -> Order:
    return source_of(data, seed=seed, **keywords).order(global_batch=global_batch, micro_batch=micro_batch)


def random_states() -> list[str]:
    return [str(torch.get_rng_state().tolist()), str(np.random.get_state()), str(random.getstate())]


sizes = st.integers(1, 60)


@given(num_samples=sizes, global_batch=sizes, micro_batch=sizes, epoch=st.integers(0, 3), world_size=st.integers(1, 9))
def test_every_sample_comes_exactly_once_an_epoch_for_any_number_of_workers(
    num_samples, global_batch, micro_batch, epoch, world_size
):
    micro_batch = min(micro_batch, global_batch)
    order = order_of(Numbers(num_samples), global_batch=global_batch, micro_batch=micro_batch)
    seen = []
    for step in range(order.num_steps(epoch)):
        num_micro_batches = order.micro_batches(epoch, step)
        for rank in range(world_size):
            for index in Roster.of_sizes((world_size,)).share(rank, num_micro_batches):
                seen += order.micro_batch_ids(epoch, step, index).tolist()
    assert sorted(seen) == list(range(num_samples))


@given(num_samples=sizes, global_batch=sizes, micro_batch=sizes)
def test_only_the_last_batches_are_short(num_samples, global_batch, micro_batch):
    micro_batch = min(micro_batch, global_batch)
    order = order_of(Numbers(num_samples), global_batch=global_batch, micro_batch=micro_batch)
    steps = [
        [len(order.micro_batch_ids(0, step, i)) for i in range(order.micro_batches(0, step))]
        for step in range(order.num_steps(0))
    ]
    assert [sum(step) for step in steps[:-1]] == [global_batch] * (len(steps) - 1)
    assert all(size == micro_batch for step in steps for size in step[:-1])
    assert all(0 < step[-1] <= micro_batch for step in steps)


@given(num_samples=st.integers(1, 60), global_batch=sizes)
def test_drop_last_leaves_out_the_short_batch_alone(num_samples, global_batch):
    source = source_of(Numbers(num_samples), seed=0)
    order = source.order(global_batch=global_batch, micro_batch=global_batch, drop_last=True)
    if num_samples < global_batch:
        with pytest.raises(DataError, match="drop_last=True"):
            order.num_steps(0)
    else:
        assert order.num_steps(0) == num_samples // global_batch
        assert all(len(order.step_ids(0, step)) == global_batch for step in range(order.num_steps(0)))


@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=20)
def test_the_permutation_is_new_each_epoch_and_a_function_of_the_seed(seed):
    first, again = order_of(Numbers(50), seed=seed), order_of(Numbers(50), seed=seed)
    assert not np.array_equal(first.ids(0), first.ids(1))
    assert not np.array_equal(first.ids(0), order_of(Numbers(50), seed=(seed + 1) % 2**63).ids(0))
    later = again.ids(1)  # without epoch 0 before it, as after a resume
    assert np.array_equal(first.ids(1), later)


def test_order_does_not_read_or_move_the_global_random_state():
    before = random_states()
    torch.manual_seed(1)
    one = order_of(Numbers(50)).ids(0).tolist()
    torch.manual_seed(2)
    states = random_states()
    assert order_of(Numbers(50)).ids(0).tolist() == one
    order_of(DataLoader(Numbers(50), sampler=RandomSampler(range(50), replacement=True))).ids(0)
    order_of(Numbers(50), order=lambda epoch: np.random.permutation(50)).ids(0)
    assert random_states() == states != before


def test_without_shuffling_ids_come_as_they_are_numbered():
    assert order_of(Numbers(5), shuffle=False).ids(3).tolist() == [0, 1, 2, 3, 4]
    assert order_of(DataLoader(Numbers(5))).ids(3).tolist() == [0, 1, 2, 3, 4]
    assert order_of(DataLoader(Numbers(5), shuffle=True), shuffle=False).ids(3).tolist() == [0, 1, 2, 3, 4]


def test_a_custom_order_is_a_sequence_or_a_function_of_the_epoch():
    assert order_of(Numbers(5), order=[4, 0, 4]).ids(7).tolist() == [4, 0, 4]
    assert order_of(Numbers(5), order=torch.tensor([3, 1])).ids(0).tolist() == [3, 1]
    assert order_of(Numbers(5), order=lambda epoch: range(epoch + 1)).ids(2).tolist() == [0, 1, 2]
    assert order_of(Numbers(5), order=lambda epoch: (i for i in (2, 0))).ids(2).tolist() == [2, 0]
    assert order_of(DataLoader(Numbers(5), shuffle=True), order=[1]).ids(0).tolist() == [1]


def test_a_custom_order_that_draws_random_numbers_depends_on_seed_and_epoch_alone():
    def draw(epoch: int) -> list[int]:
        return random.sample(range(50), 20) + torch.randperm(50)[:20].tolist() + np.random.permutation(50).tolist()

    order = order_of(Numbers(50), order=draw)
    assert not np.array_equal(order.ids(0), order.ids(1))
    random.seed(99)
    torch.manual_seed(99)
    assert np.array_equal(order.ids(1), order_of(Numbers(50), order=draw).ids(1))
    assert not np.array_equal(order.ids(1), order_of(Numbers(50), order=draw, seed=1).ids(1))


def test_later_changes_of_a_returned_array_do_not_change_the_order():
    mine = np.arange(5)
    order = order_of(Numbers(5), order=lambda epoch: mine)
    ids = order.ids(0)
    mine[:] = 0
    assert order.ids(0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize(
    "make",
    [
        lambda generator: RandomSampler(range(30), replacement=True, num_samples=40, generator=generator),
        lambda generator: RandomSampler(range(30), num_samples=10, generator=generator),
        lambda generator: SubsetRandomSampler(range(0, 30, 2), generator=generator),
        lambda generator: WeightedRandomSampler([1.0, 5.0, 2.0] * 10, 25, generator=generator),
    ],
    ids=["replacement", "part", "subset", "weighted"],
)
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_sampler_is_used_and_depends_on_seed_and_epoch_alone(make, own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(Numbers(30), sampler=make(generator))
    state = generator.get_state() if generator else None
    order = order_of(loader)
    assert len(order.ids(0)) == len(loader.sampler)
    assert not np.array_equal(order.ids(0), order.ids(1))
    assert np.array_equal(order_of(loader).ids(1), order.ids(1))
    if generator:
        assert torch.equal(generator.get_state(), state)


def test_the_random_sampler_of_a_shuffling_loader_is_the_runs_own_permutation():
    assert np.array_equal(order_of(DataLoader(Numbers(30), shuffle=True)).ids(2), order_of(Numbers(30)).ids(2))


def test_a_sampler_is_iterated_once_an_epoch_while_loading_looks_one_epoch_ahead():
    class Counting(SequentialSampler):
        passes = 0
        epochs: tuple[int, ...] = ()

        def __iter__(self):
            Counting.passes += 1
            return iter([3, 1, 2])

        def set_epoch(self, epoch: int) -> None:
            Counting.epochs += (epoch,)

    order = order_of(DataLoader(Numbers(5), sampler=Counting(range(5))))
    for epoch in (0, 1, 0, 1, 0):
        assert order.ids(epoch).tolist() == [3, 1, 2]
    assert Counting.passes == 2
    assert Counting.epochs == (0, 1)


def test_a_batch_samplers_ids_are_flattened():
    batches = [[3, 1], [4], [0, 2]]
    assert order_of(DataLoader(Numbers(5), batch_sampler=batches)).ids(0).tolist() == [3, 1, 4, 0, 2]
    sampler = BatchSampler(SequentialSampler(range(5)), batch_size=2, drop_last=True)
    assert order_of(DataLoader(Numbers(5), batch_sampler=sampler)).ids(0).tolist() == [0, 1, 2, 3]


def test_drop_last_is_the_loaders_unless_said_otherwise():
    source = source_of(DataLoader(Numbers(5), batch_size=3, drop_last=True), seed=0)
    assert source.order(global_batch=4, micro_batch=2).num_steps(0) == 1
    assert source.order(global_batch=4, micro_batch=2, drop_last=False).num_steps(0) == 2


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match=r"the data set Numbers is empty: its len\(\) is 0\. Check"):
        order_of(Numbers(0))


def test_a_data_set_that_changes_its_length_between_epochs_is_refused():
    data = Numbers(10)
    order = order_of(data)
    order.ids(0)
    data.num_samples = 9
    with pytest.raises(DataError, match="Numbers changed its length: 10 samples when the run began, 9 at epoch 1"):
        order.ids(1)


@pytest.mark.parametrize("outside", [-1, 5, 500])
def test_ids_outside_the_data_set_are_refused(outside):
    with pytest.raises(DataError, match=rf"1 ids outside .* {outside}\. Its 5 samples have the ids 0 to 4"):
        order_of(Numbers(5), order=[0, outside, 1]).ids(0)


def test_an_order_without_ids_is_refused():
    with pytest.raises(DataError, match="order of epoch 2 holds no ids"):
        order_of(Numbers(5), order=lambda epoch: [0] if epoch < 2 else []).ids(2)


@pytest.mark.parametrize("ids", [[0.5, 1.0], [[0, 1], [2, 3]], ["a"]], ids=["floats", "rows", "words"])
def test_ids_that_are_not_whole_numbers_in_a_row_are_refused(ids):
    with pytest.raises(UsageError, match="Give whole numbers"):
        order_of(Numbers(5), order=ids)


def test_an_order_that_would_be_used_up_is_refused():
    with pytest.raises(UsageError, match="used up after one epoch"):
        order_of(Numbers(5), order=iter([0, 1]))


def test_order_together_with_shuffling_is_refused():
    with pytest.raises(UsageError, match="Leave shuffle out"):
        source_of(Numbers(5), seed=0, order=[0], shuffle=True)


@pytest.mark.parametrize("shuffle", [False, True])
def test_shuffling_together_with_a_sampler_is_refused(shuffle):
    loader = DataLoader(Numbers(5), sampler=SubsetRandomSampler([1, 3]))
    with pytest.raises(UsageError, match=r"SubsetRandomSampler, which says the order\. Leave shuffle out"):
        source_of(loader, seed=0, shuffle=shuffle)
    assert order_of(loader, order=[0]).ids(0).tolist() == [0], "order= says every id, so it may"


def test_an_evaluation_takes_each_sample_once_as_numbered():
    for data in (Numbers(5), DataLoader(Numbers(5), shuffle=True, batch_size=2, drop_last=True)):
        order = source_for_evaluation(data, seed=0).order(global_batch=2, micro_batch=2)
        assert order.ids(0).tolist() == [0, 1, 2, 3, 4]
        assert order.num_steps(0) == 3


def test_an_evaluation_takes_only_the_samples_that_the_sampler_chooses():
    loader = DataLoader(Numbers(5), sampler=SubsetRandomSampler([1, 3]))
    order = source_for_evaluation(loader, seed=0).order(global_batch=2, micro_batch=2)
    assert sorted(order.ids(0).tolist()) == [1, 3]


@given(num_samples=sizes, global_batch=sizes, num_epochs=st.integers(0, 4))
def test_the_total_is_the_sum_of_the_epochs_steps_also_where_they_differ(num_samples, global_batch, num_epochs):
    for order in (None, lambda epoch: range(min(num_samples, epoch + 1))):
        order = order_of(Numbers(num_samples), global_batch=global_batch, micro_batch=1, order=order)
        assert order.total_steps(num_epochs) == sum(order.num_steps(epoch) for epoch in range(num_epochs))


@pytest.mark.parametrize(("step", "index"), [(2, 0), (-1, 0), (1, 2), (1, -1)])
def test_positions_that_do_not_exist_are_index_errors(step, index):
    order = order_of(Numbers(7), global_batch=4, micro_batch=2)
    assert len(order.micro_batch_ids(0, 1, 1)) == 1
    with pytest.raises(IndexError):
        order.micro_batch_ids(0, step, index)
