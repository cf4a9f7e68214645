"""Precision of the computation: under bf16, autocast around the user's loop body, over bf16 working weights.

Losses, and whatever else autocast keeps in fp32, stay fp32. A region in which the user's code switches autocast off
asks for fp32 weights: there `MasterWeights` hands out the fp32 masters in place of the bf16 working weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightwork.engine.weights import Weights
from lightwork.spec.job import Precision


class _Master(torch.autograd.Function):
    """The fp32 master in place of a bf16 weight; its gradient goes to the weight, rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        return master.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].to(torch.bfloat16), None


class MasterWeights(TorchFunctionMode):
    """While active, replaces bf16 weights by their masters in every torch function called with autocast off."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._masters = {
            # `.data`: all views of the shared memory have one count of writes, and autograd checks it.
            id(parameter): weights.master_view(index).data
            for index, parameter in enumerate(weights.parameters)
            if parameter.dtype == torch.bfloat16
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
        if torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if not any(id(leaf) in self._masters for leaf in leaves) or _is_attribute(func):
            return func(*args, **kwargs)
        self.used = True
        for at, leaf in enumerate(leaves):
            if id(leaf) in self._masters:
                leaves[at] = _Master.apply(leaf, self._masters[id(leaf)])  # type: ignore[no-untyped-call]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return func(*args, **kwargs)


def _is_attribute(func: Callable[..., Any]) -> bool:
    """Return whether `func` is the getter or setter of a tensor's attribute, such as `.grad`."""
    return func.__name__ in ("__get__", "__set__", "__delete__")


class Compute:
    """Under what the user's loop body runs."""

    def __init__(self, precision: Precision, weights: Weights) -> None:
        self._precision = precision
        self._masters = MasterWeights(weights) if precision == "bf16" else None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Be in the precision of the spec: around the body of the inner loop, or an evaluation."""
        if self._masters is None:
            yield
            return
        with self._masters, torch.autocast("cpu", torch.bfloat16):
            yield

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Switch autocast off: backward runs in the types that forward chose."""
        if self._masters is None:
            yield
            return
        # Recomputed regions need the masters; elsewhere the mode would only slow down the hooks on gradients.
        quiet = contextlib.nullcontext() if self._masters.used else torch._C.DisableTorchFunction()
        with quiet, torch.autocast("cpu", enabled=False):
            yield
