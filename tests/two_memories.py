"""A watch over a rehearsal: what a real device would refuse, or might read too early.

On a CPU all tensors lie in one memory, and everything is done when a call returns. This mode keeps account of what
would be otherwise on a device:

    memories   A tensor made on the rehearsal's device, or computed from one that lies there, lies there. Copies may go
               from one memory to the other, and numbers (tensors without dimensions) may come from the host. Any other
               operation on tensors of both raises `MixedMemories`.
    order      Each queue, and the host, has a clock, and knows how far the others have come that it has waited for.
               What one queue writes, another may read or write only after it has waited (or the host, in between);
               otherwise it raises `Race`. The same holds for memory that is given back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightwork.device.cpu import Rehearsal
from lightwork.engine.exchange.background import Background
from lightwork.store.elements import UnitElements

COPIES = ("copy_", "_to_copy", "_foreach_copy_")
#: Operations that neither read nor write a value.
WITHOUT_VALUES = ("set_", "resize_", "empty", "empty_like", "empty_strided", "new_empty", "record_stream")
HOST = "host"

Clock = dict[str, int]


class MixedMemories(AssertionError):
    pass


class Race(AssertionError):
    pass


class TwoMemories(TorchDispatchMode):
    """The watch. `install` lets it see the rehearsal's queues; it is then active in every thread of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._clocks: dict[str, Clock] = {}
        # By storage: first byte, end, whether written, by which queue and when.
        self._accesses: dict[int, list[tuple[int, int, bool, str, int]]] = {}
        self._queue = threading.local()
        self._lock = threading.RLock()
        self.num_checked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(plain_tensors((args, kwargs)))
        there = [tensor for tensor in tensors if self.is_there(tensor)]
        name = func.overloadpacket.__name__
        if there and len(there) < len(tensors) and name not in COPIES:
            here = [tensor for tensor in tensors if not self.is_there(tensor) and tensor.dim() > 0]
            if here and not name.startswith(("_fused", "index")):
                shapes = [tuple(t.shape) for t in here], [tuple(t.shape) for t in there]
                raise MixedMemories(f"{func} of tensors with the host and on the device: {shapes}")
        with self._lock:
            result = func(*args, **kwargs)
            stays = there and name not in ("copy_", "_foreach_copy_")
            is_new = kwargs.get("device") == Rehearsal.place
            if stays or is_new:
                pytree.tree_map_only(torch.Tensor, self._put, result)
            if not func.is_view and name not in WITHOUT_VALUES:
                written = {
                    id(tensor)
                    for argument, value in zip(func._schema.arguments, args, strict=False)
                    if argument.is_write
                    for tensor in plain_tensors(value)
                }
                queue = self._current() if there or is_new else HOST
                made = [t for t in plain_tensors(result) if id(t) not in {id(tensor) for tensor in tensors}]
                for tensor in made:  # in memory that was given back, maybe
                    self._accesses.pop(tensor.untyped_storage()._cdata, None)
                self._run(queue, str(func), [(t, id(t) in written) for t in tensors] + [(t, True) for t in made])
                waits = name == "_local_scalar_dense" or (name == "copy_" and len(there) == 1 and not is_async(args))
                if queue != HOST and waits:
                    self._join(HOST, self._clocks[queue])
        return result

    def is_there(self, tensor: torch.Tensor) -> bool:
        reference = self._there.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def _put(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and not self.is_there(tensor):
            storage = tensor.untyped_storage()
            self._there[storage._cdata] = StorageWeakRef(storage)
            self._accesses.pop(storage._cdata, None)

    # --- order ------------------------------------------------------------------------------------------------------

    def _current(self) -> str:
        names: list[str] = self._queue.__dict__.get("names", [])
        return names[-1] if names else "compute"

    def _clock(self, queue: str) -> Clock:
        return self._clocks.setdefault(queue, {})

    def _join(self, queue: str, other: Clock) -> None:
        own = self._clock(queue)
        for name, time in other.items():
            own[name] = max(own.get(name, 0), time)

    def _run(self, queue: str, what: str, accesses: list[tuple[torch.Tensor, bool]]) -> None:
        """Note an operation, which begins after everything that the host has done."""
        self._join(queue, self._clock(HOST))
        clock = self._clock(queue)
        clock[queue] = clock.get(queue, 0) + 1
        for tensor, writes in accesses:
            if not tensor.numel():
                continue
            storage = self._known(tensor)
            start = tensor.storage_offset() * tensor.itemsize
            extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            end = start + extent * tensor.itemsize
            kept = []
            for access in self._accesses.get(storage, []):
                first, last, wrote, by, time = access
                overlaps = first < end and start < last
                if overlaps and (wrote or writes) and by != queue:
                    self.num_checked += 1
                    if clock.get(by, 0) < time:
                        raise Race(f"{what} in queue {queue} of {tuple(tensor.shape)}, which {by} has in hand")
                if not (overlaps and writes and start <= first and last <= end):
                    kept.append(access)
            kept.append((start, end, writes, queue, clock[queue]))
            self._accesses[storage] = kept[-64:]

    def _known(self, tensor: torch.Tensor) -> int:
        """Return the key of a tensor's storage, whose accesses are forgotten if it was another's."""
        storage = tensor.untyped_storage()
        reference = self._storages.get(storage._cdata)
        if reference is None or reference.expired():
            self._storages[storage._cdata] = StorageWeakRef(storage)
            self._accesses.pop(storage._cdata, None)
        return storage._cdata

    def _given_back(self, whole: torch.Tensor) -> None:
        """The allocator waits for the current queue; so that must have waited for all others."""
        with self._lock:
            self._run(self._current(), "giving back", [(whole, True)])

    def install(self) -> None:
        """See what rehearsals do, in this process, from now on."""
        watch = self
        release, take, run = UnitElements.release_room, UnitElements._take, Background._run

        @contextlib.contextmanager
        def queue(_self: Rehearsal, name: str) -> Iterator[None]:
            names = watch._queue.__dict__.setdefault("names", [])
            names.append(name)
            try:
                yield
            finally:
                names.pop()

        def mark(_self: Rehearsal) -> Any:
            with watch._lock:
                return dict(watch._clock(watch._current()))

        def wait_for_mark(_self: Rehearsal, mark: Any) -> None:
            with watch._lock:
                watch._join(watch._current(), mark or {})

        def synchronize(_self: Rehearsal, mark: Any) -> None:
            with watch._lock:
                watch._join(HOST, mark or {})

        def copied(self: Rehearsal, tensor: torch.Tensor) -> torch.Tensor:
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.place)
            return there.copy_(tensor, non_blocking=True)

        def releasing(self: UnitElements, start: int, end: int) -> None:
            for unit in self._units.of_elements(start, end):
                if self._flat[unit].untyped_storage().nbytes() and watch.is_there(self._flat[unit]):
                    watch._given_back(self._whole(unit))
            release(self, start, end)

        def taking(self: UnitElements, unit: int) -> None:
            if not self._flat[unit].untyped_storage().nbytes():
                watch._accesses.pop(self._flat[unit].untyped_storage()._cdata, None)
            take(self, unit)

        def running(self: Any) -> None:
            with watch:
                run(self)

        methods: dict[str, Callable[..., Any]] = {
            "queue": queue,
            "mark": mark,
            "wait_for_mark": wait_for_mark,
            "synchronize": synchronize,
            "copied": copied,
        }
        for name, method in methods.items():
            type.__setattr__(Rehearsal, name, method)
        UnitElements.release_room = releasing  # type: ignore[method-assign]
        UnitElements._take = taking  # type: ignore[method-assign]
        Background._run = running  # type: ignore[method-assign]


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the dense tensors of a CPU in a nest of containers."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided:
            yield leaf


def is_async(args: Any) -> bool:
    """Return whether copy_ was called with non_blocking=True."""
    return len(args) > 2 and bool(args[2])
