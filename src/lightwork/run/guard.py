"""The usual mistakes of a newcomer: calls of a plain training loop that a distributed one replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.optim import optimizer as _of_all

from lightwork.errors import SpecError, UsageError
from lightwork.notice import notice
from lightwork.state.optimizer_state import GivenBack, LiveState, OptimizerState
from lightwork.state.optimizers import Optimizers


class Load(Protocol):
    """What gives the team the state of a state dict."""

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], /) -> None:
        """Load it."""


def refused_hook(kind: str, name: str = "", registered: str = "optimizer.register_step") -> str:
    """Say why a hook on an optimizer's step can not be, and what replaces it."""
    instead = {
        "pre": "To clip the gradient, pass clip_grad_norm= to distribute; change settings such as learning rates "
        "before the loop over the micro-batches of a step.",
        "post": "Do it after the loop over the micro-batches of a step, when the update is done; weights are written "
        "in run.edit().",
    }
    return (
        f"{registered}_{kind}_hook was called{f' with {name}' if name else ''}. The team takes the "
        f"optimizer's step piece by piece, so nothing calls the hook, and no worker has the whole gradient. Leave it "
        f"out. {instead[kind]}"
    )


_REPLACED = {
    "step": "optimizer.step() was called on a distributed run. Leave it out: the update happens when the loop over the "
    "micro-batches of a step ends.",
    "zero_grad": "optimizer.zero_grad() was called on a distributed run. Leave it out: gradients never outlive a step.",
    "register_step_pre_hook": refused_hook("pre"),
    "register_step_post_hook": refused_hook("post"),
}


def say_written(parameter: str | None, *, is_error: bool) -> None:
    """Say that a script has written a weight, if there is one, after the last step, while all workers shared it.

    Raises: UsageError, if it is an error; at the end of a script it is a notice.
    """
    if parameter is None:
        return
    message = (
        f"parameter {parameter} was written after the last step and before run.close(). Until then all workers share "
        "their weights, so that each of them has written the same memory. Call run.close() first, or write in "
        "`with run.edit():`."
    )
    if is_error:
        raise UsageError(message)
    notice(message)


def refuse_parameters_of_others(model: nn.Module, others: Iterable[object]) -> None:
    """Raise UsageError when a parameter of the model belongs to a model of another run, which is not closed."""
    taken = {parameter for other in others if isinstance(other, nn.Module) for parameter in other.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in taken:
            raise UsageError(
                f"parameter {name} is a parameter of another run's model, too, and would be moved away from it. Call "
                "run.close() on that run first; or give each model its own; or, if it is frozen, keep the module that "
                "has it out of both models."
            )


class Guard:
    """Stands before the optimizers until `close`: what can not be called is explained, what is state is the team's."""

    def __init__(self, optimizers: Optimizers, state: OptimizerState, load: Load) -> None:
        """Put everything in place; `load` is called for `load_state_dict`, with the optimizer and the state dict."""
        self._state = state
        self._guarded = [_Guarded(member, state, load) for member in optimizers.members]

    def check(self) -> None:
        """Raise an error when the script has changed what it can not change since the last step.

        Raises: SpecError for parameters that were added; UsageError for hooks and state that was written.
        """
        refuse_global_hooks()
        for guarded in self._guarded:
            guarded.check()

    def updated(self) -> None:
        """Tell schedulers, which warn when they step before the optimizer, that an update happened."""
        for guarded in self._guarded:
            guarded.optimizer._opt_called = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give the optimizers their methods back, and their state, in memory of their own once it is looked into."""
        state = self._state.after_the_run()
        for guarded in self._guarded:
            guarded.close(state)


class _Guarded:
    """One optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: OptimizerState, load: Load) -> None:
        self.optimizer = optimizer
        self._num_parameters = _count_parameters(optimizer)
        replaced: dict[str, Callable[..., Any]] = {name: _refusal(message) for name, message in _REPLACED.items()}
        replaced |= {"load_state_dict": partial(load, optimizer), "state_dict": partial(_state_dict, optimizer)}
        self._before = {name: vars(optimizer)[name] for name in replaced if name in vars(optimizer)}
        self._names = tuple(replaced)
        vars(optimizer).update(replaced)
        self._live = LiveState(state, optimizer)
        optimizer.state = self._live  # type: ignore[assignment]

    def check(self) -> None:
        optimizer = self.optimizer
        count = _count_parameters(optimizer)
        if count != self._num_parameters:
            raise SpecError(
                f"the optimizer has {count} parameters, {count - self._num_parameters:+d} since distribute. Parameters "
                "can not be added or removed during a run: add them before distribute, and freeze with "
                "requires_grad_(False)."
            )
        if optimizer.state is not self._live:
            raise UsageError(
                "optimizer.state was replaced during a run, which would not reach the team's memory. Write it with "
                "optimizer.load_state_dict(), which every worker calls, between two steps; or after run.close()."
            )
        self._live.check_unwritten()

    def close(self, state: OptimizerState) -> None:
        for name in self._names:
            vars(self.optimizer).pop(name, None)
        vars(self.optimizer).update(self._before)
        self.optimizer.state = GivenBack(LiveState(state, self.optimizer))  # type: ignore[assignment]


def _state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict as the class makes it, of the team's state: a copy, in ordinary dicts."""
    found = type(optimizer).state_dict(optimizer)
    found["state"] = {key: dict(value) if isinstance(value, dict) else value for key, value in found["state"].items()}
    return found


def refuse_global_hooks() -> None:
    """Raise UsageError when torch has hooks on the steps of all optimizers, which a team would call for each piece."""
    before, after = _of_all._global_optimizer_pre_hooks, _of_all._global_optimizer_post_hooks
    if not (before or after):
        return
    for kind, hooks in (("pre", before), ("post", after)):
        if hooks:
            names = ", ".join(name_of(hook) for hook in hooks.values())
            raise UsageError(refused_hook(kind, names, registered="torch.optim.optimizer.register_optimizer_step"))


def name_of(hook: object) -> str:
    """Return how a script calls a function."""
    return hook.__qualname__ if isinstance(hook, FunctionType | MethodType) else type(hook).__name__


def _count_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _refusal(message: str) -> Any:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise UsageError(message)

    refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # what torch's schedulers look for
    return refuse
