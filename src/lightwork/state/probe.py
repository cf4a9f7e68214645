"""What state an optimizer's class keeps for each parameter, found out by letting a copy of it take one step.

A *shadow* is such a copy: the class itself does the arithmetic on it, with other parameters. Element-wise classes (a
list of known ones) give the same bits on a block as on the whole parameter; any other gets whole parameters.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import optim

from lightwork.errors import SpecError
from lightwork.spec.layout import Layout, ParameterSpec
from lightwork.spec.spec import StateFormat
from lightwork.state.eight_bit import num_scales

_ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adagrad,
    optim.RMSprop,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.Adadelta,
    optim.ASGD,
    optim.Rprop,
)
_FUSED: tuple[type[optim.Optimizer], ...] = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
_FUSED_ON_GPUS = _FUSED[:3]
_REFUSED: dict[type[optim.Optimizer], str] = {
    optim.LBFGS: "it calls the loss several times an update",
    optim.SparseAdam: "it wants sparse gradients",
}

_CPU = torch.device("cpu")

#: Elements of the parameter on which an element-wise optimizer shows what state it keeps.
_PROBE_ELEMENTS = 16

#: Bytes; entries that are not of the block's own shape begin at multiples: [Note: bits and addresses].
_STATE_ALIGNMENT = 64


@dataclass(frozen=True)
class StateEntry:
    """One entry of the state that an optimizer keeps for each parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None  #: None: the shape of the parameter or block
    number: type[int] | type[float] | type[bool] | None = None  #: a Python number rather than a tensor
    on_host: bool = True  #: for a worker on a device: whether it lies with the host nevertheless


def is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Return whether the optimizer's class is known to treat every element by itself."""
    return type(optimizer) in _ELEMENTWISE


def describe_optimizer(optimizer: optim.Optimizer, *, on_gpu: bool = False) -> str:
    """Return the class and the implementation that will be used, for the spec."""
    kinds = sorted({_implementation(optimizer, group, on_gpu=on_gpu) for group in optimizer.param_groups})
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} ({', '.join(kinds)})"


def hyper_parameters(optimizer: optim.Optimizer) -> tuple[object, ...]:
    """Return all numbers in the parameter groups, in order: what must be the same on every worker."""
    values: list[object] = []
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, (int, float, tuple, list)) and name != "params":
                values.append(tuple(value) if isinstance(value, list) else value)
            elif isinstance(value, torch.Tensor):
                values.append(value.item())
    return tuple(values)


def _implementation(optimizer: optim.Optimizer, group: dict[str, Any], *, on_gpu: bool) -> str:
    if group.get("fused") or should_fuse(optimizer, group, on_gpu=on_gpu):
        return "fused"
    by_itself = on_gpu and group.get("foreach") is None  # torch's choice there
    return "foreach" if group.get("foreach") or by_itself else "single"


def should_fuse(optimizer: optim.Optimizer, group: dict[str, Any], *, on_gpu: bool) -> bool:
    """Return whether a fused implementation is used that the user has not asked for."""
    return (
        type(optimizer) in (_FUSED_ON_GPUS if on_gpu else _FUSED)
        and group.get("fused") is None
        and not any(group.get(option) for option in ("foreach", "differentiable", "capturable"))
    )


def probe_state(
    optimizer: optim.Optimizer, parameters: Sequence[ParameterSpec], device: torch.device = _CPU
) -> dict[tuple[int, tuple[int, ...]], list[StateEntry]]:
    """Return what state the optimizer keeps, by parameter group and shape (element-wise ones: one shape for all).

    Found out by letting a copy of the optimizer take one step on a scratch parameter.

    Raises: SpecError when the optimizer can not be shared by a team.
    """
    reason = next((why for cls, why in _REFUSED.items() if isinstance(optimizer, cls)), None)
    if reason is not None:
        raise SpecError(f"{type(optimizer).__name__} can not train data-parallel: {reason}. Use AdamW, SGD or another.")
    found: dict[tuple[int, tuple[int, ...]], list[StateEntry]] = {}
    for parameter in parameters:
        if parameter.group is None:
            continue
        shape = parameter.shape if parameter.whole else (_PROBE_ELEMENTS,)
        if (parameter.group, shape) not in found:
            found[parameter.group, shape] = _probe(optimizer, parameter.group, shape, device)
    return found


def _probe(
    optimizer: optim.Optimizer, group_index: int, shape: tuple[int, ...], device: torch.device
) -> list[StateEntry]:
    group = optimizer.param_groups[group_index]
    scratch = torch.zeros(shape, device=device)
    scratch.grad = torch.ones(shape, device=device)
    shadow = shadow_of(optimizer, group, [scratch])
    existing = next((s for p in group["params"] if (s := optimizer.state.get(p)) and p.dim() > 0), None)
    if existing is not None:  # state made in the constructor (Adagrad), or loaded by the user
        owner = next(p for p in group["params"] if optimizer.state.get(p) and p.dim() > 0)
        shadow.state[scratch] = {
            name: _scratch_like(value, owner, shape, device, moves=bool(shadow.param_groups[0].get("fused")))
            for name, value in existing.items()
        }
    before = {name: value for name, value in shadow.param_groups[0].items() if name != "params"}
    try:
        with torch.no_grad():
            bare_step(optimizer)(shadow)
    except Exception as error:
        raise SpecError(
            f"{type(optimizer).__name__} failed on a scratch parameter of shape {shape}: {error}. "
            "Check its settings and "
            "that its parameters have shapes that it supports."
        ) from error
    changed = [name for name, value in before.items() if value != shadow.param_groups[0].get(name)]
    if changed:
        raise SpecError(
            f"{type(optimizer).__name__} changes its parameter groups in step() "
            f"({', '.join(changed)}), which a team can not "
            "share. Use an optimizer that keeps its state by parameter."
        )
    state = shadow.state[scratch]
    return [_entry(optimizer, name, value, shape, device) for name, value in state.items() if value is not None]


def _scratch_like(
    value: object, owner: torch.Tensor, shape: tuple[int, ...], device: torch.device, *, moves: bool
) -> object:
    """Return zeros like an entry of the state of `owner`; with `moves`, also counts of steps go to the device."""
    if isinstance(value, torch.Tensor):
        alike = value.shape == owner.shape
        place = device if alike or moves or value.device.type != "cpu" else value.device
        return torch.zeros(shape if alike else value.shape, dtype=value.dtype, device=place)
    return value


def _entry(
    optimizer: optim.Optimizer, name: str, value: object, shape: tuple[int, ...], device: torch.device
) -> StateEntry:
    if isinstance(value, torch.Tensor):
        alike = value.shape == shape
        # A count of steps lies with the host, where an optimizer reads it; a rehearsal can not see where.
        on_host = value.device.type == "cpu" and (value.dim() == 0 or device.type != "cpu")
        return StateEntry(name, value.dtype, None if alike else tuple(value.shape), on_host=on_host)
    if isinstance(value, (bool, int, float)):
        return StateEntry(name, torch.float64, (), type(value))
    raise SpecError(
        f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state ({name!r}). Tensors "
        "and numbers can be shared "
        "by a team; use another optimizer."
    )


def shadow_of(optimizer: optim.Optimizer, group: dict[str, Any], tensors: Sequence[torch.Tensor]) -> optim.Optimizer:
    """Return a copy of `optimizer` with one parameter group: that of `group`, over `tensors`."""
    shadow: optim.Optimizer = object.__new__(type(optimizer))  # its own copy protocol would drop attributes
    shadow.__dict__.update(optimizer.__dict__)
    shadow.__dict__.pop("step", None)  # what a scheduler or the run put over the class's own
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    shadow.param_groups = [{**group, "params": list(tensors)}]
    if should_fuse(optimizer, group, on_gpu=tensors[0].is_cuda):
        shadow.param_groups[0]["fused"] = True
    shadow.state = defaultdict(dict)
    return shadow


def bare_step(optimizer: optim.Optimizer) -> Callable[[optim.Optimizer], object]:
    """Return the class's `step`, to be called without autograd.

    torch's own classes wrap it for profilers and compilers: that costs as much as a small update itself, and imports
    torch._dynamo. What another class wraps it for is not known, and kept.
    """
    step: Callable[[optim.Optimizer], object] = type(optimizer).step
    return inspect.unwrap(step) if is_elementwise(optimizer) else step


def has_plain_adam_kernel(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether an update is nothing but torch's fused kernel of Adam or AdamW, with numbers as settings."""
    plain = isinstance(group.get("lr"), float) and all(isinstance(beta, float) for beta in group.get("betas", (None,)))
    return (
        plain
        and type(optimizer) in (optim.Adam, optim.AdamW)
        and _implementation(optimizer, group, on_gpu=True) == "fused"
    )


class StateLayout:
    """Where each block's state lies: a flat region for each entry of the parameters' shape, one for the rest."""

    def __init__(
        self,
        layout: Layout,
        entries: dict[tuple[int, tuple[int, ...]], list[StateEntry]],
        state_format: StateFormat = "fp32",
    ) -> None:
        self.flat: dict[str, torch.dtype] = {}
        self.in_8_bits: set[str] = set()  #: of the flat ones
        self.scales_of_block: list[tuple[int, int]] = []  #: first and end, in the region of scales of an entry
        at = 0
        for block in layout.blocks:
            self.scales_of_block.append((at, at + num_scales(block.end - block.start)))
            at = self.scales_of_block[-1][1]
        self.num_scales = at
        self.odd_bytes = 0
        self.number_bytes = 0  #: of odd state on the host
        self.of_block: list[list[tuple[StateEntry, int]]] = []  # with the offset in bytes
        for block in layout.blocks:
            parameter = layout.parameters[block.parameter]
            if parameter.group is None:
                raise ValueError(f"{parameter.name} has blocks but no parameter group")
            shape = parameter.shape if parameter.whole else (_PROBE_ELEMENTS,)
            places = []
            for entry in entries[parameter.group, shape]:
                if entry.shape is None:
                    self.flat[entry.name] = entry.dtype
                    if state_format == "int8" and entry.dtype is torch.float32:
                        self.flat[entry.name] = torch.uint8
                        self.in_8_bits.add(entry.name)
                    places.append((entry, (layout.offsets[block.parameter] + block.start) * entry.dtype.itemsize))
                else:
                    places.append((entry, self.number_bytes if entry.on_host else self.odd_bytes))
                    num_bytes = max(1, torch.Size(entry.shape).numel()) * entry.dtype.itemsize
                    num_bytes = -(-num_bytes // _STATE_ALIGNMENT) * _STATE_ALIGNMENT
                    if entry.on_host:
                        self.number_bytes += num_bytes
                    else:
                        self.odd_bytes += num_bytes
            self.of_block.append(places)
