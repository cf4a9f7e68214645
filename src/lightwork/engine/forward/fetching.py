"""Weights that are brought just before they are read, and given back after: shared out among hosts (ZeRO-3), or
offloaded from a device.

Each bucket's weights stay with its owner, or in the host's memory. Where they are computed with, their place is empty
until an operation is about to read them; the values arrive at the same place ([Note: coming and leaving] in
`state/places`). So weights never move as far as autograd and modules can see.

    forward    `Fetching` sees every torch function of the loop body and of the model, and brings the weights among its
               arguments, and views of them
    backward   what autograd has saved of weights is brought when it is taken out
    ahead      what followed the last time is asked for while the present operation runs
    given back when other weights need the room: least recently used first
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightwork.engine.forward.away import AwayParameter, class_for
from lightwork.engine.forward.hooks import ModuleHook, Outermost
from lightwork.engine.forward.transforms import outside_transforms
from lightwork.errors import RankLost, SpecError, UsageError
from lightwork.spec.holdings import Depths
from lightwork.state.places import HeldBy, Visits, Where
from lightwork.state.weights import Weights

#: Parameters that are looked at to find what to ask for ahead.
_LOOK_AHEAD = 16


class SavedWeights:
    """What is done with weights that autograd saves. Here: they stay where they are, and are always there."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in the memory of the weights."""
        return self._weights.parameter_of(tensor) is not None

    def bring_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a saved tensor when backward takes it out; a weight with its values."""
        return tensor


class Fetching(SavedWeights):
    """What a step does about weights that come and go. Here: none do."""

    #: Whether backward needs a mode of torch functions.
    needs_mode = False

    def watch_modules(self, model: nn.Module) -> None:
        """Be active in every forward of the model, also outside the loop."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Bring what torch functions read, and what backward takes out of what they save."""
        return contextlib.nullcontext()

    def in_backward(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights of a forward that runs within backward until their gradients are there."""
        return contextlib.nullcontext()

    def has_gradient(self, parameter: int) -> None:
        """Say that backward has the gradient of a parameter: operations before it are done."""

    def bring_for_update(self, bucket: int, *, values: bool) -> None:
        """Keep room for a bucket here, with its present values if they are wanted, until `leave_updated`."""

    def leave_updated(self, bucket: int) -> None:
        """Let a bucket go home, with the values that its update wrote here."""

    def leave_written(self, parameter: int) -> None:
        """Let go of a parameter whose value was written between steps."""

    def settle(self) -> None:
        """Give back all weights that are here for a while, and return when all are at home."""

    def close(self) -> None:
        """Take the hooks off the modules."""


class WeightsOnTheirWay(Fetching):
    """Weights that come before they are read.

    Owns: the memory of these weights here, and hooks on the modules, until `close`.
    """

    needs_mode = True

    def __init__(self, weights: Weights, visits: Visits, depths: Depths, close_sources: Callable[[], None]) -> None:
        super().__init__(weights)
        self._visits = visits
        self._depths = depths
        self._close_sources = close_sources
        layout = weights.layout
        self._buckets_of = [
            [bucket for bucket in layout.buckets_of(index) if visits.comes_and_goes(bucket)]
            for index in range(len(layout.parameters))
        ]
        self._index_of = {id(parameter): index for index, parameter in enumerate(weights.parameters)}
        self._parameter = (-1, -1)  # the last two that were needed
        self._following: dict[tuple[int, int], int] = {}
        self._again: set[int] = set()  # parameters that a forward within backward has needed
        self._in_backward = False
        self._is_active = False
        self._is_closed = False
        self._hooks: list[RemovableHandle] = []
        self._mode = _BringsArguments(self)

    def watch_modules(self, model: nn.Module) -> None:
        """Be active in every forward.

        Raises: SpecError when a part of the model is compiled.
        """
        away = class_for(self)
        for index in self._index_of.values():
            parameter = self._weights.parameters[index]
            if self._buckets_of[index] and type(parameter) is nn.Parameter:
                parameter.__class__ = away
        outermost = Outermost(self.active)
        for name, module in model.named_modules():
            if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
                raise SpecError(
                    f"module {name or type(module).__name__} is compiled, and placement zero3 brings weights while "
                    "Python runs the model. Leave out torch.compile, or choose zero2."
                )
            self._hooks.append(module.register_forward_pre_hook(ModuleHook(outermost.before)))
            if _asks_for_modes(module):
                self._watch_whole(module)
            self._hooks.append(module.register_forward_hook(ModuleHook(outermost.after), always_call=True))

    def _watch_whole(self, module: nn.Module) -> None:
        """Bring all weights of a module in eval mode, and leave it alone: it has a faster way while no mode is on."""
        parameters = [self._index_of[id(p)] for p in module.parameters() if id(p) in self._index_of]
        buckets = {bucket for index in parameters for bucket in self._buckets_of[index]}
        within: list[Any] = []

        def before(module: nn.Module, _inputs: object) -> None:
            if not module.training and not within:
                within.append(torch._C.DisableTorchFunction())
                within[-1].__enter__()
                for index in parameters:
                    self._need(index, HeldBy.MODULE)

        def after(_module: nn.Module, _inputs: object, _output: object) -> None:
            if within:
                within.pop().__exit__(None, None, None)
                self._visits.let_go(HeldBy.MODULE, buckets)

        self._hooks.append(module.register_forward_pre_hook(ModuleHook(before)))
        self._hooks.append(module.register_forward_hook(ModuleHook(after), always_call=True))

    def close(self) -> None:
        """Take the hooks off the modules, and let the other hosts' threads end."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self._weights.parameters:
            if isinstance(parameter, AwayParameter) and not self.parameters_of(parameter):
                parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        self._is_closed = True
        self._close_sources()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let a mode see torch functions, and hooks what autograd saves."""
        if self._is_active:
            yield
            return
        self._is_active = True
        try:
            with self._mode, saved_tensors_hooks(_unchanged, self.bring_saved):
                yield
        finally:
            self._is_active = False
            self._visits.let_go(HeldBy.FUNCTION)

    @property
    def brings(self) -> bool:
        """Whether all that torch functions read is brought now."""
        return self._is_active

    def parameters_of(self, value: Any) -> Sequence[int]:
        """Return the parameters that come and go in whose memory a value lies."""
        with torch._C.DisableTorchFunctionSubclass():
            return [index for index in self._find(value) if self._buckets_of[index]]

    def check_open(self, parameter: int) -> None:
        """Raise UsageError after `close`."""
        if self._is_closed:
            raise UsageError(self.refusal(parameter, "was read after run.close()"))

    def refusal(self, parameter: int, why: str) -> str:
        """Say what is not possible with a parameter, and what replaces it."""
        return (
            f"parameter {self._weights.layout.parameters[parameter].name} {why}. Its weights are elsewhere until they "
            "are needed (placement zero3, or weights offloaded from a device): read them with parameter.detach(), "
            "model.state_dict() or run.state_dict(), before run.close(); write them in `with run.edit():`."
        )

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Hold the weights that a forward within backward reads, each until its gradient is there."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            self._again.clear()
            self._visits.let_go(HeldBy.SAVED | HeldBy.AGAIN)

    def bring_arguments(self, arguments: Iterable[Any]) -> None:
        """Return when the weights among the arguments of a torch function, which is about to run, are here."""
        parameters = [index for value in arguments for index in self._find(value)]
        if not parameters:
            return
        self._visits.let_go(HeldBy.FUNCTION)
        by = HeldBy.FUNCTION
        if self._in_backward:
            self._again.update(parameters)
            by |= HeldBy.AGAIN
        for index in parameters:
            self._need(index, by)

    def bring_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that autograd has saved; if it is a weight, with its values."""
        with torch._C.DisableTorchFunction():  # the mode would see what is called here
            for index in self._find(tensor):
                self._need(index, HeldBy.SAVED)
        return tensor

    def has_gradient(self, parameter: int) -> None:
        """Let go of what the operations before it have read."""
        self._visits.let_go(HeldBy.SAVED)
        if parameter in self._again:
            self._again.discard(parameter)
            others = {bucket for index in self._again for bucket in self._buckets_of[index]}
            self._visits.let_go(HeldBy.AGAIN, set(self._buckets_of[parameter]) - others)

    def bring_for_update(self, bucket: int, *, values: bool) -> None:
        """Hold the bucket, with its values or with room alone."""
        if values:
            self._visits.ask(bucket)
        else:
            self._visits.make_room(bucket)
        self._visits.arrive(bucket)
        self._visits.hold(bucket, HeldBy.UPDATE)

    def leave_updated(self, bucket: int) -> None:
        """Let the bucket leave, with what its update wrote."""
        self._visits.leave(bucket, written=True)

    def settle(self) -> None:
        """Let all leave."""
        self._visits.settle()

    # --- their way --------------------------------------------------------------------------------------------------

    def _find(self, value: Any) -> Iterable[int]:
        """Return the parameters that an argument of a torch function lies in: a tensor, or each tensor of a list."""
        if isinstance(value, torch.Tensor):
            index = self._weights.parameter_of(value)
            return () if index is None else (index,)
        if isinstance(value, (list, tuple)):
            return [index for item in value for index in self._find(item)]
        return ()

    def _need(self, parameter: int, by: HeldBy) -> None:
        """Return when a parameter is here, held by `by`."""
        buckets = self._buckets_of[parameter]
        if parameter != self._parameter[1]:
            self._following[self._parameter] = parameter
            self._parameter = self._parameter[1], parameter
        try:
            with outside_transforms():
                for bucket in buckets:
                    self._visits.ask(bucket)
                    self._visits.hold(bucket, by)
                self._ask_ahead(buckets)
                for bucket in buckets:
                    self._visits.arrive(bucket)
        except RankLost as error:
            raise RankLost(
                f"{error} It owns weights that are read here (placement zero3), so it has to run as long as they are."
            ) from error
        self._visits.leave_room(self._depths.kept)

    def _ask_ahead(self, needed: Sequence[int]) -> None:
        """Ask for what followed the parameter last time, as far as `Depths.ahead` goes."""
        place, room = self._parameter, -1
        for _ in range(_LOOK_AHEAD):
            following = self._following.get(place)
            if following is None:
                return
            place = place[1], following
            for bucket in self._buckets_of[following]:
                if self._visits.where(bucket) is Where.AWAY:
                    if room < 0:  # counted when it is needed
                        room = self._depths.ahead - sum(other not in needed for other in self._visits.coming)
                    if room <= 0:
                        return
                    self._visits.ask(bucket)
                    room -= 1


class _BringsArguments(TorchFunctionMode):
    """While active, brings the weights that torch functions read."""

    def __init__(self, fetching: WeightsOnTheirWay) -> None:
        super().__init__()
        self._fetching = fetching

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` once the weights among its arguments are here."""
        kwargs = kwargs or {}
        name = func.__name__
        is_view = name == "__get__" and func.__self__.__name__ in _VIEWS  # type: ignore[attr-defined]
        if is_view or name not in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                self._fetching.bring_arguments((*args, *kwargs.values()))
        return func(*args, **kwargs)


#: Attributes of a tensor that do not read its values.
_WITHOUT_VALUES = frozenset({"__get__", "__set__", "__delete__", "size", "dim", "numel", "stride", "is_floating_point"})


#: Attributes of a tensor that are views of its values.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})


def _asks_for_modes(module: nn.Module) -> bool:
    """Return whether a module's code asks whether torch functions are overridden, as nn.MultiheadAttention does."""
    functions = (f for cls in type(module).__mro__ for f in vars(cls).values() if isinstance(f, FunctionType))
    return any("has_torch_function" in function.__code__.co_names for function in functions)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
