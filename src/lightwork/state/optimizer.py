"""The user's optimizer, carried out on blocks of the shared weights.

An element-wise optimizer (a list of known classes) gives the same bits on a block as on the whole parameter, because
blocks are cut at multiples of the kernels' vector width. Any other, known (Muon, Adafactor) or not, gets whole
parameters. Either way the class itself does the arithmetic: each bucket has a *shadow*, a copy of the user's optimizer
object whose parameters are the bucket's blocks and whose state lies in shared memory, so that whoever is free can
update any bucket. Hyper-parameters are read from the user's object before every call: schedulers work as usual.

Where a class has a fused implementation it is used, unless the user chose one (`fused=False`, `foreach=True`).

Not covered: optimizers that keep state in their parameter groups or on themselves, need a closure, or want sparse
gradients. They are refused by name.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import optim

from lightwork.errors import SpecError
from lightwork.spec.layout import Block, Layout, ParameterSpec, span_of
from lightwork.spec.spec import StateFormat
from lightwork.state.eight_bit import SQUARES, num_scales, restore_into, round_into
from lightwork.state.parameters import like
from lightwork.state.weights import Weights
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions

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

#: Bytes between two pieces of state of a block that are not of the block's own shape.
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
    if group.get("fused") or _should_fuse(optimizer, group, on_gpu=on_gpu):
        return "fused"
    by_itself = on_gpu and group.get("foreach") is None  # torch's choice there
    return "foreach" if group.get("foreach") or by_itself else "single"


def _should_fuse(optimizer: optim.Optimizer, group: dict[str, Any], *, on_gpu: bool) -> bool:
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
    shadow = _shadow_of(optimizer, group, [scratch])
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
            _bare_step(optimizer)(shadow)
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


def _shadow_of(optimizer: optim.Optimizer, group: dict[str, Any], tensors: Sequence[torch.Tensor]) -> optim.Optimizer:
    """Return a copy of `optimizer` with one parameter group: that of `group`, over `tensors`."""
    shadow: optim.Optimizer = object.__new__(type(optimizer))  # its own copy protocol would drop attributes
    shadow.__dict__.update(optimizer.__dict__)
    shadow.__dict__.pop("step", None)  # what a scheduler or the run put over the class's own
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    shadow.param_groups = [{**group, "params": list(tensors)}]
    if _should_fuse(optimizer, group, on_gpu=tensors[0].is_cuda):
        shadow.param_groups[0]["fused"] = True
    shadow.state = defaultdict(dict)
    return shadow


def _bare_step(optimizer: optim.Optimizer) -> Callable[[optim.Optimizer], object]:
    """Return the class's `step`, to be called without autograd.

    torch's own classes wrap it for profilers and compilers: that costs as much as a small update itself, and imports
    torch._dynamo. What another class wraps it for is not known, and kept.
    """
    step: Callable[[optim.Optimizer], object] = type(optimizer).step
    return inspect.unwrap(step) if is_elementwise(optimizer) else step


def _has_plain_adam_kernel(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether an update is nothing but torch's fused kernel of Adam or AdamW, with numbers as settings."""
    plain = isinstance(group.get("lr"), float) and all(isinstance(beta, float) for beta in group.get("betas", (None,)))
    return (
        plain
        and type(optimizer) in (optim.Adam, optim.AdamW)
        and _implementation(optimizer, group, on_gpu=True) == "fused"
    )


def _fused_adam(
    group: dict[str, Any],
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    state: dict[str, list[torch.Tensor]],
) -> None:
    """Do what `step` of Adam and AdamW does with `fused=True`, of which a small update spends three quarters in Python.

    (Two-layer perceptron, 2026-11: 190 us by `step`, 45 by this.)
    """
    torch._foreach_add_(state["step"], 1)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        state["exp_avg"],
        state["exp_avg_sq"],
        state.get("max_exp_avg_sq", []),
        state["step"],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
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


class BlockOptimizer:
    """Updates buckets of the shared weights, with the shared state."""

    def __init__(
        self, optimizer: optim.Optimizer, weights: Weights, state_layout: StateLayout, memory: Regions
    ) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._layout = weights.layout
        self._state_layout = state_layout
        self._memory = memory
        self._homes = {name: memory.home(f"state {name}", dtype) for name, dtype in state_layout.flat.items()}
        self._here = {name: memory.here(f"state {name}", dtype) for name, dtype in state_layout.flat.items()}
        self._scales = {name: memory.tensor(f"scales {name}", torch.float32) for name in state_layout.in_8_bits}
        # Where state in 8 bits becomes fp32 for an update: of one bucket at a time.
        blocks = self._layout.blocks
        of_bucket = [blocks[bucket.first_block : bucket.end_block] for bucket in self._layout.buckets]
        largest = max((sum(b.end - b.start for b in bucket) for bucket in of_bucket), default=0)
        device = memory.device.place
        self._wide = {name: torch.empty(largest, device=device) for name in state_layout.in_8_bits}
        self._wide_offsets = [
            sum(b.end - b.start for b in bucket[:i]) for bucket in of_bucket for i in range(len(bucket))
        ]
        self._odd = memory.tensor("state odd")
        self._numbers = memory.tensor("state numbers")  # of the odd state, what an optimizer keeps on the host
        self._initialised = memory.region("state initialised")  # a byte for each block
        self._step = _bare_step(optimizer)
        self._shadows: dict[int, tuple[optim.Optimizer, list[torch.Tensor]]] = {}
        self._views: dict[int, list[tuple[StateEntry, torch.Tensor]]] = {}  # of each block, made once
        self._lists: dict[int, tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]] = {}  # of each bucket

    def update(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take one optimizer step on the blocks of `bucket`; `gradients`, one for each, flat or None to skip it.

        To be called without autograd (`torch.no_grad`).

        Shapes: as the blocks, or the whole parameter's.
        """
        spec = self._layout.buckets[bucket]
        in_8_bits = [
            (name, index)
            for name in self._state_layout.in_8_bits
            for index, gradient in zip(range(spec.first_block, spec.end_block), gradients, strict=True)
            if gradient is not None
        ]
        for name, index in in_8_bits:
            if self._initialised[index]:
                self._restore(name, index, self._wide_view(name, index))
        self._update(bucket, gradients)
        for name, index in in_8_bits:
            self._round(name, index, self._wide_view(name, index))

    def _update(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> None:
        spec = self._layout.buckets[bucket]
        group, first = self._optimizer.param_groups[spec.group], spec.first_block
        present = [gradient for gradient in gradients if gradient is not None]
        is_new = 0 in bytes(self._initialised[first : spec.end_block])
        if len(present) == len(gradients) and not is_new and _has_plain_adam_kernel(self._optimizer, group):
            parameters, state = self._lists_of(bucket)
            _fused_adam(group, parameters, present, state)
            return
        shadow, tensors = self._shadow(bucket)
        indices = [first + i for i, gradient in enumerate(gradients) if gradient is not None]
        old = [i for i in indices if self._initialised[i]]
        # New blocks in a call of their own: a fused kernel takes its list for new or old as a whole.
        for chosen in (old, [i for i in indices if not self._initialised[i]]):
            if not chosen:
                continue
            for index in chosen:
                tensor, gradient = tensors[index - first], gradients[index - first]
                tensor.grad = like(gradient, tensor) if gradient is not None else None
                if chosen is old:
                    self._attach(shadow, tensor, index)
            self._step(shadow)
            for index in chosen:
                tensors[index - first].grad = None
                self._keep(shadow, tensors[index - first], index)

    def state_of(self, parameter: int) -> dict[str, torch.Tensor]:
        """Return a parameter's whole state as tensors (views), empty before its first update.

        Numbers become float64.
        """
        blocks = [i for i, block in enumerate(self._layout.blocks) if block.parameter == parameter]
        if not blocks or not self._initialised[blocks[0]]:
            return {}
        tensor = self._weights.parameters[parameter]
        start = self._layout.offsets[parameter]
        state = {}
        for entry, offset in self._state_layout.of_block[blocks[0]]:
            if entry.name in self._wide:
                flat = torch.empty(tensor.numel())
                for index in blocks:
                    block = self._layout.blocks[index]
                    packed = self._packed(entry.name, index, self._homes)
                    wide = self._wide_view(entry.name, index)
                    restore_into(wide, *packed, square=entry.name in SQUARES)
                    flat[block.start : block.end].copy_(wide)
                state[entry.name] = like(flat, tensor)
            elif entry.shape is None:
                state[entry.name] = like(self._homes[entry.name].view(start, start + tensor.numel()), tensor)
            else:
                state[entry.name] = self._odd_view(entry, offset)
        return state

    def release_home(self, bucket: int) -> None:
        """Give back the room at home of the state of a bucket that another host owns."""
        for block in self._layout.blocks_of(bucket):
            span = span_of(self._layout, block)
            for home in self._homes.values():
                home.release(span.start, span.end)

    @property
    def places(self) -> list[tuple[str, Elements, Elements]]:
        """The same regions, each at home and as an update sees it."""
        return [(f"state {name}", home, self._here[name]) for name, home in self._homes.items()]

    @property
    def initialised(self) -> memoryview:
        """A byte for each block: whether it has been updated."""
        return self._initialised

    def flat_views(self, index: int) -> list[torch.Tensor]:
        """Return each entry of a block's state, contiguous, in shared memory."""
        span = span_of(self._layout, self._layout.blocks[index])
        views = []
        for entry, offset in self._state_layout.of_block[index]:
            if entry.shape is None:
                views.append(self._homes[entry.name].view(span.start, span.end))
                if entry.name in self._scales:
                    views.append(self._scales[entry.name][slice(*self._state_layout.scales_of_block[index])])
            else:
                views.append(self._odd_view(entry, offset).view(-1))
        return views

    def load_state(self, parameter: int, state: dict[str, torch.Tensor | float]) -> None:
        """Write a parameter's whole state; empty makes it new.

        Raises: SpecError when an entry is missing or has another shape.
        """
        spec = self._layout.parameters[parameter]
        for index, block in enumerate(self._layout.blocks):
            if block.parameter != parameter:
                continue
            self._initialised[index] = bool(state)
            for entry, offset in self._state_layout.of_block[index] if state else []:
                if entry.name not in state:
                    raise SpecError(
                        f"the optimizer's state for {spec.name} has no {entry.name!r}; it has {', '.join(state)}."
                    )
                value = torch.as_tensor(state[entry.name])
                view = self._view(index, entry, offset, self._homes)
                if entry.shape is None:
                    if value.numel() != spec.numel:
                        raise SpecError(
                            f"the optimizer's state {entry.name!r} for {spec.name} has "
                            f"{value.numel()} elements, the parameter "
                            f"{spec.numel}."
                        )
                    value = self._flatten(value, parameter)[block.start : block.end].view(view.shape)
                view.copy_(value)
                if entry.name in self._wide:
                    packed = self._packed(entry.name, index, self._homes)
                    round_into(*packed, view.to(packed[0].device), square=entry.name in SQUARES)
        self._shadows.clear()

    def _flatten(self, value: torch.Tensor, parameter: int) -> torch.Tensor:
        """Return a parameter-shaped tensor in the order in which the parameter's elements lie in memory."""
        flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
        like(flat, self._weights.parameters[parameter]).copy_(value.view(self._weights.parameters[parameter].shape))
        return flat

    def _shadow(self, index: int) -> tuple[optim.Optimizer, list[torch.Tensor]]:
        bucket = self._layout.buckets[index]
        group = self._optimizer.param_groups[bucket.group]
        if index not in self._shadows:
            tensors = [self._block_tensor(self._layout.blocks[i]) for i in range(bucket.first_block, bucket.end_block)]
            self._shadows[index] = _shadow_of(self._optimizer, group, tensors), tensors
        shadow, tensors = self._shadows[index]
        fresh = {**group, "params": tensors}
        if _should_fuse(self._optimizer, group, on_gpu=tensors[0].is_cuda):
            fresh["fused"] = True
        shadow.param_groups[0].update(fresh)
        return shadow, tensors

    def _block_tensor(self, block: Block) -> torch.Tensor:
        if self._layout.parameters[block.parameter].whole:
            return self._weights.master_here(block.parameter)
        span = span_of(self._layout, block)
        return self._weights.masters_here.view(span.start, span.end)

    def _view(self, index: int, entry: StateEntry, offset: int, places: Mapping[str, Elements]) -> torch.Tensor:
        """Return an entry of a block's state; `places` are homes, or where an update sees them."""
        block = self._layout.blocks[index]
        if entry.name in self._wide:
            return self._wide_view(entry.name, index)
        if entry.shape is None:
            span = span_of(self._layout, block)
            flat = places[entry.name].view(span.start, span.end)
            if self._layout.parameters[block.parameter].whole:
                return like(flat, self._weights.parameters[block.parameter])
            return flat
        return self._odd_view(entry, offset)

    def _odd_view(self, entry: StateEntry, offset: int) -> torch.Tensor:
        num_bytes = torch.Size(entry.shape or ()).numel() * entry.dtype.itemsize
        region = self._numbers if entry.on_host else self._odd
        return region[offset : offset + num_bytes].view(entry.dtype).view(entry.shape or ())

    def _wide_view(self, name: str, index: int) -> torch.Tensor:
        """Return where a block's state in 8 bits becomes fp32."""
        block, at = self._layout.blocks[index], self._wide_offsets[index]
        return self._wide[name][at : at + block.end - block.start]

    def _packed(self, name: str, index: int, places: Mapping[str, Elements]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a block's state in 8 bits, and its scales."""
        span = span_of(self._layout, self._layout.blocks[index])
        values = places[name].view(span.start, span.end)
        return values, self._scales[name][slice(*self._state_layout.scales_of_block[index])]

    def _restore(self, name: str, index: int, target: torch.Tensor) -> None:
        restore_into(target, *self._packed(name, index, self._here), square=name in SQUARES)

    def _round(self, name: str, index: int, source: torch.Tensor) -> None:
        round_into(*self._packed(name, index, self._here), source, square=name in SQUARES)

    def _attach(self, shadow: optim.Optimizer, tensor: torch.Tensor, index: int) -> None:
        """Make the shadow see the shared state of a block that any worker may have updated last."""
        state = shadow.state[tensor]
        for entry, view in self._views_of(index):
            if entry.number is not None:
                state[entry.name] = entry.number(view.item())
            elif entry.name not in state:
                state[entry.name] = view

    def _keep(self, shadow: optim.Optimizer, tensor: torch.Tensor, index: int) -> None:
        """Put what the optimizer made outside the shared state (at a block's first update, or anew at each) into it."""
        state = shadow.state[tensor]
        for entry, view in self._views_of(index):
            value = state.get(entry.name)
            if value is None or value is view:
                continue
            if entry.number is not None:
                view.fill_(value)
            else:
                view.copy_(value)
                state[entry.name] = view
        self._initialised[index] = 1

    def _lists_of(self, bucket: int) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """Return the blocks of a bucket and each entry of their state, block by block."""
        lists = self._lists.get(bucket)
        if lists is None:
            spec = self._layout.buckets[bucket]
            state: dict[str, list[torch.Tensor]] = defaultdict(list)
            for index in range(spec.first_block, spec.end_block):
                for entry, view in self._views_of(index):
                    state[entry.name].append(view)
            blocks = self._layout.blocks[spec.first_block : spec.end_block]
            lists = self._lists[bucket] = [self._block_tensor(block) for block in blocks], dict(state)
        return lists

    def _views_of(self, index: int) -> list[tuple[StateEntry, torch.Tensor]]:
        views = self._views.get(index)
        if views is None:
            places = self._state_layout.of_block[index]
            views = self._views[index] = [
                (entry, self._view(index, entry, offset, self._here)) for entry, offset in places
            ]
        return views
