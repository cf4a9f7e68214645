"""Weights that are brought just before they are used, and given back after: shared out among hosts (ZeRO-3), or
offloaded from a device.

Each bucket's weights stay with its owner, or in the host's memory. Where they are computed with, their place is empty
until an operation is about to read them: then the host asks the owner, whose thread answers whatever its worker is
doing, or copies them, and the values arrive at the same place. So weights never move as far as autograd and modules can
see, no host waits for another one's path through the model, and a host that has more micro-batches than others hangs
nobody.

    forward    `ShardedWeights` sees every torch function of the loop body and of the model, and brings the weights
               among its arguments, and views of them
    backward   what autograd has saved of weights is brought when it is taken out
    ahead      what followed the last time is asked for while the present operation runs
    given back when other weights need the room: least recently used first

Moves: two requests of 8 bytes and twice the weights' bytes of other hosts a micro-batch, in and out (forward, and
backward), less what stays between them. Of offloaded ones, twice their bytes to the device.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightwork.device.base import Backlog, Device, Mark
from lightwork.errors import RankLost, SpecError
from lightwork.spec.hosts import Hosts
from lightwork.state.weights import Weights
from lightwork.transport.base import FIRST_TAG, Carrier, Pending

_REQUEST, _ANSWER = range(FIRST_TAG, FIRST_TAG + 2)

#: The request of a host that will make no more.
_GOODBYE = -1

#: Buckets of other hosts that are kept while nobody uses them.
KEPT = 4

#: Buckets that are asked for ahead.
AHEAD = 2

#: Parameters that are looked at to find them.
_LOOK_AHEAD = 16


def serve(weights: Weights, carrier: Carrier, device: Device) -> None:
    """Answer the other hosts' requests for buckets, until all have said goodbye or are gone."""
    request = torch.empty(1, dtype=torch.int64)
    open_hosts = carrier.num_hosts - 1
    with contextlib.suppress(RankLost), device.queue("out"):  # the exchange of gradients names it
        while open_hosts:
            host = carrier.receive_from_any(request, _REQUEST)
            bucket = int(request)
            if bucket == _GOODBYE:
                open_hosts -= 1
                continue
            device.wait(weights.accepted)
            for pending in [carrier.send(host, tensor, _ANSWER) for tensor in weights.of_bucket(bucket)]:
                pending.wait()


class Source(Protocol):
    """Where weights come from."""

    def has(self, bucket: int) -> bool:
        """Return whether a bucket comes from here."""

    def request(self, bucket: int, tensors: Sequence[torch.Tensor]) -> list[Pending]:
        """Begin to bring a bucket into `tensors`, as computation sees it."""

    def close(self) -> None:
        """Say that nothing will be asked for any more."""


class Owners:
    """The other hosts, as sources."""

    def __init__(self, hosts: Hosts, carrier: Carrier) -> None:
        self._hosts = hosts
        self._carrier = carrier

    def has(self, bucket: int) -> bool:
        """Return whether another host owns it."""
        return self._hosts.owner(bucket) != self._carrier.host

    def request(self, bucket: int, tensors: Sequence[torch.Tensor]) -> list[Pending]:
        """Ask the owner."""
        owner = self._hosts.owner(bucket)
        pending = [self._carrier.receive(owner, tensor, _ANSWER) for tensor in tensors]
        return [*pending, self._carrier.send(owner, torch.tensor([bucket]), _REQUEST)]

    def close(self) -> None:
        """Let the other hosts' threads end."""
        goodbye = torch.tensor([_GOODBYE])
        for host in range(len(self._hosts)):
            if host != self._carrier.host:
                with contextlib.suppress(RankLost):
                    self._carrier.send(host, goodbye, _REQUEST).wait()


class Home:
    """This host's memory, as the source of what a device has offloaded."""

    def __init__(self, weights: Weights, device: Device, left: Callable[[int], Mark]) -> None:
        """`left` returns when a bucket was last at home again."""
        self._weights = weights
        self._device = device
        self._left = left

    def has(self, bucket: int) -> bool:
        """Return whether it is offloaded."""
        return self._weights.comes_and_goes(bucket)

    def request(self, bucket: int, tensors: Sequence[torch.Tensor]) -> list[Pending]:
        """Begin to copy it."""
        with self._device.queue("in"):
            self._device.wait(self._left(bucket))
            for home, here in zip(self._weights.of_bucket(bucket), tensors, strict=True):
                here.copy_(home, non_blocking=True)
            return [_Copied(self._device, self._device.mark())]

    def close(self) -> None:
        """Do nothing."""


@final
class _Copied(Pending):
    """What a queue brings."""

    def __init__(self, device: Device, mark: Mark) -> None:
        self._device = device
        self._mark = mark

    def wait(self) -> None:
        """Let the current queue wait."""
        self._device.wait(self._mark)


class ShardedWeights(TorchFunctionMode):
    """The weights that are not kept here, as this worker needs them. As a mode: brings what torch functions read.

    Owns: the memory of these weights here, and hooks on the modules, until `close`.
    """

    def __init__(self, weights: Weights, device: Device, sources: Sequence[Source]) -> None:
        """Of the `sources`, the first that has a bucket brings it; what none has is always here."""
        super().__init__()
        self._weights = weights
        self._device = device
        self._sources = sources
        self._backlog = Backlog(device, KEPT)
        layout = weights.layout
        self._buckets_of: list[list[int]] = [[] for _ in layout.parameters]
        for bucket, spec in enumerate(layout.buckets):
            if any(source.has(bucket) for source in sources):
                for parameter in sorted({b.parameter for b in layout.blocks[spec.first_block : spec.end_block]}):
                    self._buckets_of[parameter].append(bucket)
        self._index_of = {id(parameter): index for index, parameter in enumerate(weights.parameters)}
        self._taken: Mark = None  # when room was taken
        self._here: OrderedDict[int, None] = OrderedDict()  # buckets, the least recently used first
        self._coming: dict[int, list[Pending]] = {}
        self._parameter = (-1, -1)  # the last two that were needed
        self._following: dict[tuple[int, int], int] = {}
        self._in_use: set[int] = set()  # buckets of the torch function that runs
        self._whole: set[int] = set()  # ... of a module that is left alone
        self._saved: set[int] = set()  # ... of what backward has taken out since the last gradient
        self._again: dict[int, None] = {}  # parameters that a forward within backward has needed
        self._in_backward = False
        self._depth = 0  # of modules' forwards that run
        self._is_active = False
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Be active in every forward of the model, also outside the loop.

        Raises: SpecError when a part of the model is compiled.
        """
        entered: list[Any] = []

        def before(_module: nn.Module, _inputs: object) -> None:
            self._depth += 1
            if self._depth == 1 and not self._is_active:
                entered.append(self.active())
                entered[-1].__enter__()

        def after(_module: nn.Module, _inputs: object, _output: object) -> None:
            self._depth -= 1
            if self._depth == 0 and entered:
                entered.pop().__exit__(None, None, None)

        for name, module in model.named_modules():
            if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
                raise SpecError(
                    f"module {name or type(module).__name__} is compiled, and placement zero3 brings weights while "
                    "Python runs the model. Leave out torch.compile, or choose zero2."
                )
            self._hooks.append(module.register_forward_pre_hook(before))
            if _asks_for_modes(module):
                self._watch_whole(module)
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    def _watch_whole(self, module: nn.Module) -> None:
        """Bring all weights of a module in eval mode, and leave it alone: it has a faster way while no mode is on."""
        parameters = [self._index_of[id(p)] for p in module.parameters() if id(p) in self._index_of]
        buckets = {bucket for index in parameters for bucket in self._buckets_of[index]}
        within: list[Any] = []

        def before(module: nn.Module, _inputs: object) -> None:
            if not module.training and not within:
                self._whole |= buckets
                within.append(torch._C.DisableTorchFunction())
                within[-1].__enter__()
                for index in parameters:
                    self._need(index)

        def after(_module: nn.Module, _inputs: object, _output: object) -> None:
            if within:
                within.pop().__exit__(None, None, None)
                self._whole -= buckets

        self._hooks.append(module.register_forward_pre_hook(before))
        self._hooks.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Take the hooks off the modules, and let the other hosts' threads end."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for source in self._sources:
            source.close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Bring what torch functions read, and what backward takes out of what they save."""
        if self._is_active:
            yield
            return
        self._is_active = True
        try:
            with self, saved_tensors_hooks(_unchanged, self.bring):
                yield
        finally:
            self._is_active = False
            self._in_use.clear()

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Keep the weights of a forward that runs within backward until their gradients are there."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            self._saved.clear()
            self._again.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` once the weights among its arguments are here."""
        kwargs = kwargs or {}
        if func.__name__ not in _WITHOUT_VALUES:
            parameters = [index for value in (*args, *kwargs.values()) for index in self._find(value)]
            if parameters:
                self._in_use = {bucket for index in parameters for bucket in self._buckets_of[index]}
                if self._in_backward:
                    self._again.update(dict.fromkeys(parameters))
                for index in parameters:
                    self._need(index)
        return func(*args, **kwargs)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in the memory of the weights."""
        return self._weights.is_weight(tensor)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that autograd has saved; if it is a weight, with its values."""
        with torch._C.DisableTorchFunction():  # the mode would see what is called here
            for index in self._find(tensor):
                self._saved.update(self._buckets_of[index])
                self._need(index)
        return tensor

    def folded(self, parameter: int) -> None:
        """Say that backward has the gradient of a parameter: operations before it are done."""
        self._saved.clear()
        self._again.pop(parameter, None)

    def forget(self) -> None:
        """Give back all weights of other hosts: they are about to change."""
        for bucket in [*self._coming]:
            self._arrive(bucket)
        for bucket in [*self._here]:
            self._give_back(bucket)

    def hold(self, bucket: int, *, values: bool) -> None:
        """Keep room for a bucket here, with its present values if they are wanted, until `leave`."""
        if values:
            self._ask(bucket)
        elif bucket not in self._here and bucket not in self._coming:
            self._take(bucket)
            self._device.wait(self._taken)
        self._arrive(bucket)
        self._in_use.add(bucket)

    def leave(self, bucket: int) -> None:
        """Let go of a bucket: its values here are no longer those at home, which are about to change."""
        self._in_use.discard(bucket)
        self._here.pop(bucket, None)
        self._weights.give_back(bucket)

    # --- which parameters -------------------------------------------------------------------------------------------

    def _find(self, value: Any) -> Iterable[int]:
        """Return the parameters whose memory a value is, or the values of a list."""
        if isinstance(value, torch.Tensor):
            index = self._weights.parameter_of(value)
            return () if index is None else (index,)
        if isinstance(value, (list, tuple)):
            return [index for item in value for index in self._find(item)]
        return ()

    # --- their way --------------------------------------------------------------------------------------------------

    def _need(self, parameter: int) -> None:
        """Return when a parameter is here."""
        buckets = self._buckets_of[parameter]
        if parameter != self._parameter[1]:
            self._following[self._parameter] = parameter
            self._parameter = self._parameter[1], parameter
        try:
            for bucket in buckets:
                self._ask(bucket)
            self._ask_ahead(buckets)
            for bucket in buckets:
                self._arrive(bucket)
                self._here.move_to_end(bucket)
        except RankLost as error:
            raise RankLost(
                f"{error} It owns weights that are read here (placement zero3), so it has to run as long as they are."
            ) from error
        self._make_room()

    def _ask_ahead(self, needed: Sequence[int]) -> None:
        """Ask for what followed the parameter last time, as far as `AHEAD` goes."""
        room = AHEAD - sum(bucket not in needed for bucket in self._coming)
        place = self._parameter
        for _ in range(_LOOK_AHEAD):
            following = self._following.get(place)
            if following is None:
                return
            place = place[1], following
            for bucket in self._buckets_of[following]:
                if bucket not in self._here and bucket not in self._coming:
                    if room <= 0:
                        return
                    self._ask(bucket)
                    room -= 1

    def _ask(self, bucket: int) -> None:
        """Ask the owner for a bucket that is neither here nor coming."""
        if bucket in self._here or bucket in self._coming:
            return
        self._take(bucket)
        source = next(source for source in self._sources if source.has(bucket))
        self._coming[bucket] = source.request(bucket, self._weights.here_of_bucket(bucket))

    def _take(self, bucket: int) -> None:
        with self._device.queue("in"):
            self._weights.take(bucket)
            self._taken = self._device.mark()

    def _arrive(self, bucket: int) -> None:
        for pending in self._coming.pop(bucket, ()):
            pending.wait()
        self._here[bucket] = None

    def _make_room(self) -> None:
        surplus = len(self._here) - KEPT
        if surplus <= 0:
            return
        pinned = (
            self._in_use | self._whole | self._saved | {b for index in self._again for b in self._buckets_of[index]}
        )
        for bucket in [bucket for bucket in self._here if bucket not in pinned][:surplus]:
            self._give_back(bucket)

    def _give_back(self, bucket: int) -> None:
        del self._here[bucket]
        self._weights.give_back(bucket)
        self._backlog.add(self._device.mark())


#: Attributes of a tensor that do not read its values.
_WITHOUT_VALUES = frozenset({"__get__", "__set__", "__delete__", "size", "dim", "numel", "stride", "is_floating_point"})


def _asks_for_modes(module: nn.Module) -> bool:
    """Return whether a module's code asks whether torch functions are overridden, as nn.MultiheadAttention does."""
    functions = (f for cls in type(module).__mro__ for f in vars(cls).values() if isinstance(f, FunctionType))
    return any("has_torch_function" in function.__code__.co_names for function in functions)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
