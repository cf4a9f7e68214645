"""Precision of the computation: under bf16 or fp16, working weights of that type, and autocast around the loop body.

Losses, and whatever else autocast keeps in fp32, stay fp32. A region in which the user's code switches autocast off
asks for fp32 weights: there `MasterWeights` hands out the fp32 masters in place of the working weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.backends import mha
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightwork.device.base import Device
from lightwork.engine.backward.early import Early
from lightwork.engine.forward.fetching import Fetching
from lightwork.engine.forward.hooks import ModuleHook, Outermost
from lightwork.errors import UsageError
from lightwork.spec.spec import Precision
from lightwork.state.parameters import DTYPES, NARROW
from lightwork.state.weights import Weights


class _Master(torch.autograd.Function):
    """The fp32 master in place of a narrow weight; its gradient goes to the weight, rounded to its type."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return master.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class MasterWeights(TorchFunctionMode):
    """While active, replaces narrow weights by their masters in every torch function called with autocast off."""

    def __init__(self, weights: Weights, *, has_masters: bool, device_type: str) -> None:
        super().__init__()
        self._has_masters = has_masters
        self._device_type = device_type
        self._masters = {
            # `.data`: all views of the shared memory have one count of writes, and autograd checks it.
            id(parameter): weights.master_view(index).data
            for index, parameter in enumerate(weights.parameters)
            if parameter.dtype in (torch.bfloat16, torch.float16)
        }
        self.used = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, with masters for weights where autocast is off."""
        kwargs = kwargs or {}
        if torch.is_autocast_enabled(self._device_type):
            return func(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if not any(id(leaf) in self._masters for leaf in leaves) or _is_attribute(func):
            return func(*args, **kwargs)
        if not self._has_masters:
            raise UsageError(
                "the model switches autocast off and uses weights there, which takes their fp32 masters, and the plan "
                "shares these out among the hosts, or offloads them. Name the module in fp32_modules, or keep masters: "
                "placement='replicate', without offload of the optimizer."
            )
        self.used = True
        for at, leaf in enumerate(leaves):
            if id(leaf) in self._masters:
                leaves[at] = _Master.apply(leaf, self._masters[id(leaf)])  # type: ignore[no-untyped-call]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Let transformers in eval mode run as they were trained: their fast path knows nothing of autocast on a CPU.

    Beside narrow weights it can not take fp32 masks.
    """
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def _is_attribute(func: Callable[..., Any]) -> bool:
    """Return whether `func` is the getter or setter of a tensor's attribute, such as `.grad`."""
    return func.__name__ in ("__get__", "__set__", "__delete__")


class Compute:
    """The surroundings of the user's loop body: precision, weights that are fetched, a look at what autograd saves.

    The mode that hands out masters costs 7 us a torch function (2026-11). So it is on for the first micro-batch of
    each worker, and stays on where it was needed, or where the code of a module mentions autocast.
    """

    def __init__(
        self,
        precision: Precision,
        weights: Weights,
        model: nn.Module,
        *,
        has_masters: bool,
        device: Device,
        fetching: Fetching,
        early: Early,
    ) -> None:
        """`has_masters` says whether computation sees every fp32 master; `early` watches what autograd saves."""
        self._fetching = fetching
        self._early = early
        self._device_type = device.place.type
        self._dtype = DTYPES[NARROW.get(precision, "float32")]
        self._masters = (
            MasterWeights(weights, has_masters=has_masters, device_type=self._device_type)
            if precision in NARROW
            else None
        )
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
        functions = (f for cls in classes - {nn.Module} for f in vars(cls).values() if isinstance(f, FunctionType))
        self._watched = any(_mentions_autocast(function.__code__) for function in functions)
        self._bodies = 0
        self._is_active = False
        self._hooks: list[RemovableHandle] = []
        if self._masters is not None and model._compiled_call_impl is None:
            self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        """Be active in a forward of the whole model, wherever it is called: its weights are narrow."""
        outermost = Outermost(self._active_unless_it_is)
        self._hooks.append(model.register_forward_pre_hook(ModuleHook(outermost.before)))
        self._hooks.append(model.register_forward_hook(ModuleHook(outermost.after), always_call=True))

    def _active_unless_it_is(self) -> contextlib.AbstractContextManager[None]:
        if self._is_active or torch.is_autocast_enabled(self._device_type):
            return contextlib.nullcontext()
        return self.active()

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Be in the precision of the spec: around the body of the inner loop, or an evaluation."""
        with self._fetching.active(), self._early.watching():
            if self._masters is None:
                yield
                return
            self._bodies += 1
            was_active, self._is_active = self._is_active, True
            try:
                with (
                    self._masters if self._is_watched else contextlib.nullcontext(),
                    torch.autocast(self._device_type, self._dtype),
                    _without_fast_paths(),
                ):
                    yield
            finally:
                self._is_active = was_active

    def run_backward(self, loss: torch.Tensor) -> None:
        """Run backward, with autocast off: it runs in the types that forward chose."""
        if self._masters is None and not self._fetching.needs_mode:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        # Regions that backward runs again need the modes; elsewhere they would only slow down the hooks on gradients.
        needs_modes = self._fetching.needs_mode or (self._masters is not None and self._masters.used)
        with (
            contextlib.nullcontext() if needs_modes else torch._C.DisableTorchFunction(),
            self._fetching.in_backward(),
            torch.autocast(self._device_type, enabled=False),
        ):
            if needs_modes:
                # `backward` is a torch function itself, and a mode is off in what it is called for.
                one = torch.ones_like(loss)
                _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            else:
                loss.backward()  # type: ignore[no-untyped-call]

    @property
    def _is_watched(self) -> bool:
        return self._watched or self._bodies <= 1 or (self._masters is not None and self._masters.used)


def _mentions_autocast(code: CodeType) -> bool:
    """Return whether a function, or one defined in it, names autocast."""
    return "autocast" in code.co_names or any(
        _mentions_autocast(constant) for constant in code.co_consts if isinstance(constant, CodeType)
    )
