"""Copies of a script's optimizer that the class's own `step` works on: shadows, and whole copies to try things on."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import optim

from lightwork.state.optimizers import is_elementwise, should_fuse


def shadow_of(optimizer: optim.Optimizer, group: dict[str, Any], tensors: Sequence[torch.Tensor]) -> optim.Optimizer:
    """Return a copy of `optimizer` with one parameter group: that of `group`, over `tensors`. It has no state."""
    shadow = _bare(optimizer)
    shadow.__dict__.update(_attributes(optimizer))
    shadow.param_groups = [{**group, "params": list(tensors)}]
    if should_fuse(optimizer, group, on_gpu=tensors[0].is_cuda):
        shadow.param_groups[0]["fused"] = True
    return shadow


def whole_copy(optimizer: optim.Optimizer, stand_ins: Mapping[torch.Tensor, torch.Tensor]) -> optim.Optimizer:
    """Return a copy of an optimizer and all that it has, with `stand_ins` for its parameters. It has no state."""
    whole = _bare(optimizer)
    memo: dict[int, object] = {id(parameter): stand_in for parameter, stand_in in stand_ins.items()}
    memo[id(optimizer)] = whole
    for name, value in _attributes(optimizer).items():
        try:
            whole.__dict__[name] = copy.deepcopy(value, memo)
        except Exception:  # what can not be copied (a lock, a file) is shared
            whole.__dict__[name] = value
    whole.param_groups = copy.deepcopy(optimizer.param_groups, memo)  # the same as a wrapped optimizer's, if these are
    return whole


def _bare(optimizer: optim.Optimizer) -> optim.Optimizer:
    bare: optim.Optimizer = object.__new__(type(optimizer))  # its own copy protocol would drop attributes
    bare._optimizer_step_pre_hooks = OrderedDict()
    bare._optimizer_step_post_hooks = OrderedDict()
    bare.state = defaultdict(dict)
    return bare


def _attributes(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer has beside groups, state and hooks on its step."""
    of_class = dir(type(optimizer))
    own = {"param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    return {
        name: value
        for name, value in vars(optimizer).items()
        # Methods that a scheduler or the run put over the class's own stay where they are.
        if name not in own and not (callable(value) and name in of_class)
    }


def bare_step(optimizer: optim.Optimizer) -> Callable[[optim.Optimizer], object]:
    """Return the class's `step`, to be called without autograd.

    torch's own classes wrap it for profilers and compilers: that costs as much as a small update itself, and imports
    torch._dynamo. What another class wraps it for is not known, and kept.
    """
    step: Callable[[optim.Optimizer], object] = type(optimizer).step
    return inspect.unwrap(step) if is_elementwise(optimizer) else step
