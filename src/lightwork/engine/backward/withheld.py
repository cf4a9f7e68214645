"""What stands in `.grad` of a run's parameters: a gradient that says, when it is used, that it is not to be had here.

A micro-batch's gradients go into the team's sums while backward runs. A script that clips or scales them in its loop,
as a plain one does, would find None, do nothing, and train on unclipped. So each parameter holds a tensor without
memory that any operation refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightwork.errors import UsageError
from lightwork.state.parameters import plainly

_aten = torch.ops.aten


class WithheldGradient(torch.Tensor):
    """In place of the gradient of one parameter: its shape and type alone."""

    parameter: str  #: its name

    @staticmethod
    def __new__(cls, like: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> WithheldGradient:
        """Return one for a parameter like `like`."""
        made: WithheldGradient = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=like.device
        )
        made.parameter = name
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Say what it stands for."""
        return f"<the gradient of {self.parameter}, which has gone into the sums of the team>"

    def tolist(self) -> Any:
        """Refuse."""
        raise UsageError(_refusal(self.parameter))

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse."""
        raise UsageError(_refusal(self.parameter))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Refuse whatever is computed with it; what only hands it on is let through."""
        gradient = _first(args)
        if func in (_aten.detach.default, _aten.alias.default):
            return gradient
        if func is _aten._to_copy.default:  # the model is converted; that is named when the next step begins
            return cls(gradient, gradient.parameter, (kwargs or {}).get("dtype"))
        is_added_to = func in (_aten.add.Tensor, _aten.add_.Tensor)
        if is_added_to and torch._C._current_graph_task_id() != -1:  # by a backward; hooks say what of it
            return gradient
        raise UsageError(_refusal(gradient.parameter))


def _first(value: Any) -> WithheldGradient:
    """Return the first gradient among arguments."""
    waiting = [value]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, WithheldGradient):
            return one
        if isinstance(one, (tuple, list)):
            waiting.extend(one)
    raise ValueError("an operation on no gradient")


def _refusal(name: str) -> str:
    return (
        f"the gradient of parameter {name} was read or written. After step.backward it is in the sums of the team: no "
        "worker has the whole gradient, and what is done to it here would be lost. To clip, pass clip_grad_norm=, "
        "clip_grad_value= or clip_grad_adaptive= to lightwork.distribute; the norm is step.grad_norm, after the inner "
        "loop; to see or scale each micro-batch's gradient, parameter.register_hook(...)."
    )


class Withheld:
    """The gradients that stand in for those of a model.

    Owns: `.grad` of every parameter, until `close`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> None:
        self._parameters = parameters
        self._names = names
        self._pairs: list[tuple[nn.Parameter, WithheldGradient]] = []  # of those that have been trainable

    def add(self, index: int) -> None:
        """Stand in for the gradient of a parameter, which has become trainable."""
        parameter = self._parameters[index]
        self._pairs.append((parameter, WithheldGradient(parameter, self._names[index])))

    def make_way(self) -> None:
        """Empty `.grad` for a backward, which adds to what is there.

        Raises: UsageError when the script has put a gradient there.
        """
        for parameter, gradient in self._pairs:
            found = parameter.grad
            if found is not None:
                if found is not gradient:
                    raise UsageError(
                        f"parameter {gradient.parameter} has a gradient that is none of the run's: .grad was written, "
                        "or loss.backward() was called outside the loop. Only step.backward(loss) makes gradients; for "
                        "those of something else use torch.autograd.grad, or another model."
                    )
                parameter.grad = None

    def stand_in(self) -> None:
        """Put them where a plain backward would leave gradients."""
        for parameter, gradient in self._pairs:
            parameter.grad = gradient

    @plainly
    def close(self) -> None:
        """Take them away."""
        for parameter, gradient in self._pairs:
            if parameter.grad is gradient:
                parameter.grad = None
        self._pairs.clear()
