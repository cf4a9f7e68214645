"""Fetching: a batch is a function of (seed, epoch, ids), in whatever state the process is; what can not be split is
refused with the alternative."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    random_split,
)

from lightwork.data.batch import tensors
from lightwork.data.source import Source, source_of, stream_of
from lightwork.errors import DataError, UsageError


def fetch(data, ids, *, epoch=0, seed=0):
    return source_of(data, seed=seed).fetch(epoch, np.array(ids))


def bits(batch) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors(batch)]


def collated(data, ids):
    return default_collate([data[i] for i in ids])


def assert_same(batch, expected):
    assert type(batch) is type(expected)
    for one, other in zip(batch, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


# Randomness of a sample.


def test_a_sample_does_not_depend_on_its_neighbours_or_on_what_was_drawn_before(augmented):
    source = source_of(augmented, seed=3)
    together = source.fetch(1, np.array([4, 7, 9]))
    torch.rand(100), np.random.rand(7), random.random()
    alone = source.fetch(1, np.array([7]))
    assert torch.equal(together["noise"][1], alone["noise"][0])
    assert torch.equal(together["pair"][1][1], alone["pair"][1][0])
    assert together["pair"][0][1] == alone["pair"][0][0]


def test_a_sample_is_augmented_anew_in_another_epoch_and_with_another_seed(augmented):
    batches = [fetch(augmented, [5], epoch=epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({batch["noise"].numpy().tobytes() for batch in batches}) == 4
    assert len({batch["pair"][0].item() for batch in batches}) == 4


def test_a_collate_function_that_draws_random_numbers_is_seeded_too(augmented):
    def cut(samples):
        return torch.stack([s["noise"] for s in samples]) * torch.rand(1) + np.random.rand() + random.random()

    loader = DataLoader(augmented, collate_fn=cut)
    first = fetch(loader, [1, 2])
    torch.rand(3)
    assert torch.equal(first, fetch(loader, [1, 2]))
    assert not torch.equal(first, fetch(loader, [1, 2], epoch=1))


def test_every_sample_and_the_collate_function_have_a_seed_of_their_own():
    class Seeds(list):
        def __getitem__(self, index):
            return torch.initial_seed(), np.random.get_state()[1][0], random.getstate()[1][1]

    def collate(samples):
        return [*samples, (torch.initial_seed(), np.random.get_state()[1][0], random.getstate()[1][1])]

    seeds = fetch(DataLoader(Seeds(range(4)), collate_fn=collate), [2, 0, 3])
    assert [len(set(kind)) for kind in zip(*seeds, strict=True)] == [4, 4, 4]


def test_batched_item_access_is_not_used_so_that_augmentation_stays_per_sample(augmented):
    class Both(type(augmented)):
        def __getitems__(self, indices):
            raise AssertionError("not called")

    assert bits(fetch(Both(), [3, 4])) == bits(fetch(augmented, [3, 4]))
    assert bits(fetch(Subset(Both(), [3, 4]), [1])) != bits(fetch(augmented, [4])), "a subset has ids of its own"


def test_lists_and_arrays_are_data_sets_too():
    assert fetch([10, 11, 12], [2, 0]).tolist() == [12, 10]
    assert fetch(np.arange(6.0).reshape(3, 2), [1]).tolist() == [[2.0, 3.0]]


def test_a_sample_is_fetched_with_one_thread_and_without_autocast_as_in_a_loading_worker():
    class Telling(list):
        def __getitem__(self, index):
            return torch.get_num_threads(), torch.is_autocast_enabled("cpu")

    def collate(samples):
        return [*samples, (torch.get_num_threads(), torch.is_autocast_enabled("cpu"))]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert fetch(DataLoader(Telling([1]), collate_fn=collate), [0]) == [(1, False), (1, False)]
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


# Data sets of tensors are gathered.


def tensor_data(num_samples: int = 20) -> TensorDataset:
    x = torch.randn(num_samples, 3, 2)
    return TensorDataset(x, torch.arange(num_samples), x.bfloat16(), x > 0)


@pytest.mark.parametrize("ids", [[0], [19, 3, 3, 7], list(range(20))], ids=["one", "repeated", "all"])
def test_gathering_equals_collating_sample_by_sample(ids):
    data = tensor_data()
    assert_same(fetch(data, ids), collated(data, ids))


def test_gathering_through_nested_subsets_equals_collating_sample_by_sample():
    parts = random_split(tensor_data(), [12, 8])
    nested = Subset(parts[0], [5, 11, 0, 3, -2])
    for data in (*parts, nested):
        ids = list(range(len(data)))[::-1]
        assert_same(fetch(data, ids), collated(data, ids))


def test_gathering_leaves_the_random_state_alone_and_calls_no_item_access(monkeypatch):
    data = Subset(tensor_data(), range(10))
    source = source_of(data, seed=0)
    expected = collated(data, [2, 4])
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    state = torch.get_rng_state()
    assert_same(source.fetch(0, np.array([2, 4])), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subclass_of_a_tensor_data_set_is_asked_for_its_items():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    data = Doubled(torch.arange(5))
    assert fetch(data, [3, 4])[0].tolist() == [6, 8]
    assert fetch(Subset(data, [4, 3]), [0])[0].tolist() == [8]


def test_tensors_with_other_strides_keep_the_strides_of_collating():
    data = TensorDataset(torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(4, 6).T)
    assert_same(fetch(data, [1, 5]), collated(data, [1, 5]))


def test_a_tensor_data_set_with_a_collate_function_is_collated_by_it():
    assert fetch(DataLoader(tensor_data(), collate_fn=len), [1, 2, 3]) == 3


def test_a_subset_of_ids_that_are_not_there_names_the_sample():
    with pytest.raises(DataError, match="sample 1 of the data set Subset"):
        fetch(Subset(tensor_data(), [0, 99]), [0, 1])


# Failures.


def test_a_failing_sample_is_named_with_its_cause(failing):
    cause = ValueError("truncated file")
    with pytest.raises(DataError, match=r"sample 7 of .* Failing .* epoch 2: ValueError: truncated file\. ") as caught:
        fetch(failing(7, cause), [1, 7], epoch=2)
    assert caught.value.__cause__ is cause


def test_an_index_error_of_a_data_set_that_lost_samples_says_that_it_shrank(augmented):
    class Shrinking(type(augmented)):
        def __getitem__(self, index):
            if index >= self.num_samples:
                raise IndexError(index)
            return index

    data = Shrinking(10)
    source = source_of(data, seed=0)
    data.num_samples = 8
    with pytest.raises(DataError, match=r"Shrinking shrank: sample 9 is gone at epoch 1, 10 samples .* 8 now"):
        source.fetch(1, np.array([9]))


def test_an_index_error_of_the_users_own_code_is_not_called_shrinking(failing):
    with pytest.raises(DataError, match=r"could not be fetched .*IndexError: my list"):
        fetch(failing(3, IndexError("my list")), [3])


def test_samples_that_do_not_collate_are_named():
    with pytest.raises(DataError, match=r"collate function failed on samples 0, 1 of .*collate_fn=") as caught:
        fetch([torch.zeros(2), torch.zeros(3)], [0, 1])
    assert isinstance(caught.value.__cause__, RuntimeError)


# What can be a source.


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Lengthless(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream()), ChainDataset([Stream()])], ids=type)
def test_what_is_iterated_is_a_stream(data):
    stream = stream_of(data, seed=0)
    assert list(stream.lane(0, 0, 4)) == list(range(5))
    assert stream_of([1, 2, 3], seed=0) is None


@pytest.mark.parametrize(
    "data", [3, None, Lengthless(), iter([1, 2]), {1, 2}, (i for i in [1])], ids=lambda d: type(d).__name__
)
def test_what_is_not_a_data_set_is_refused(data):
    with pytest.raises(UsageError, match=r"is not a data set: it lacks __len__ or __getitem__\. Pass"):
        source_of(data, seed=0)


def test_a_data_set_class_in_place_of_an_instance_is_refused():
    with pytest.raises(UsageError, match=r"Write TensorDataset\(\.\.\.\)"):
        source_of(TensorDataset, seed=0)


@pytest.mark.parametrize("batched", [False, True])
def test_a_distributed_sampler_is_refused_by_name(augmented, batched):
    sampler = DistributedSampler(augmented, num_replicas=4, rank=0)
    if batched:
        loader = DataLoader(augmented, batch_sampler=torch.utils.data.BatchSampler(sampler, 2, False))
    else:
        loader = DataLoader(augmented, sampler=sampler)
    with pytest.raises(UsageError, match=r"DistributedSampler for 4 replicas.*Leave the sampler out"):
        source_of(loader, seed=0)


def test_a_loader_of_ready_made_batches_is_refused(augmented):
    with pytest.raises(UsageError, match="batch_size=None"):
        source_of(DataLoader(augmented, batch_size=None), seed=0)


def test_a_loaders_parts_are_used_and_its_batch_size_is_not():
    loader = DataLoader(ConcatDataset([[1, 2], [3]]), batch_size=2, collate_fn=sum, num_workers=1, prefetch_factor=5)
    source: Source = source_of(loader, seed=0)
    assert source.fetch(0, np.array([0, 1, 2])) == 6
    assert source.loading_workers.num_workers == 1
    assert source.loading_workers.prefetch_factor == 5
