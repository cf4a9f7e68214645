"""What state each optimizer keeps for parameters of each shape: a shadow of it takes a few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import optim

from lightwork.errors import SpecError
from lightwork.spec.layout import ParameterSpec
from lightwork.state.observation import Observed
from lightwork.state.optimizers import Optimizers
from lightwork.state.shadow import bare_step, shadow_of
from lightwork.state.state_layout import PROBE_ELEMENTS, Probed, StateEntry

_CPU = torch.device("cpu")


def probe_state(
    optimizers: Optimizers,
    parameters: Sequence[ParameterSpec],
    observed: Mapping[int, Observed],
    device: torch.device = _CPU,
    *,
    has_spare_room: bool = True,
) -> dict[Probed, list[StateEntry]]:
    """Return what state is kept, by parameter group and shape (element-wise optimizers: one shape for all).

    Found out by letting a shadow take steps on a scratch parameter, as many as were `observed` to make all of it. With
    `has_spare_room`, also what there may be when a setting is switched on later.

    Raises: SpecError when the state is nothing that can be shared by a team.
    """
    found: dict[Probed, list[StateEntry]] = {}
    for parameter in parameters:
        if parameter.group is None or parameter.numel == 0:
            continue
        shape = parameter.shape if parameter.whole else (PROBE_ELEMENTS,)
        if (parameter.group, shape) not in found:
            seen = observed[parameter.group]
            switches = seen.switches if has_spare_room else {}
            found[parameter.group, shape] = _probe(optimizers, parameter.group, shape, seen.num_steps, switches, device)
    return found


def _probe(
    optimizers: Optimizers,
    number: int,
    shape: tuple[int, ...],
    num_steps: int,
    switches: Mapping[str, object],
    device: torch.device,
) -> list[StateEntry]:
    optimizer, group = optimizers.owner(number), optimizers.group(number)
    scratch = torch.zeros(shape, dtype=torch.float32, device=device)
    scratch.grad = torch.ones(shape, dtype=torch.float32, device=device)
    shadow = shadow_of(optimizer, group, [scratch])
    owner = next((p for p in group["params"] if optimizers.state_of(p) and p.dim() > 0), None)
    if owner is not None:  # state made in the constructor (Adagrad), or loaded by the user
        shadow.state[scratch] = {
            name: _scratch_like(value, owner, shape, device, moves=bool(shadow.param_groups[0].get("fused")))
            for name, value in optimizers.state_of(owner).items()
        }
    first: set[str] = set()
    steady: set[str] = set()
    for step in range(num_steps + bool(switches)):
        if step == num_steps:
            steady = {name for name, value in shadow.state[scratch].items() if value is not None}
            shadow.param_groups[0].update(switches)
        try:
            with torch.no_grad():
                bare_step(optimizer)(shadow)
        except Exception as error:
            raise SpecError(
                f"{type(optimizer).__name__} failed on a scratch parameter of shape {shape}: {error}. Check its "
                "settings and that its parameters have shapes that it supports."
            ) from error
        if step == 0:
            first = {name for name, value in shadow.state[scratch].items() if value is not None}
    return [
        replace(
            _entry(optimizer, name, value, shape, device),
            comes_later=name not in first,
            is_spare=bool(switches) and name not in steady,
        )
        for name, value in shadow.state[scratch].items()
        if value is not None
    ]


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
    optimizer: optim.Optimizer, name: str, value: Any, shape: tuple[int, ...], device: torch.device
) -> StateEntry:
    if isinstance(value, torch.Tensor):
        alike = value.shape == shape
        # A count of steps lies with the host, where an optimizer reads it; a rehearsal can not see where.
        on_host = value.device.type == "cpu" and (value.dim() == 0 or device.type != "cpu")
        return StateEntry(name, value.dtype, None if alike else tuple(value.shape), on_host=on_host)
    if isinstance(value, (bool, int, float)):
        return StateEntry(name, torch.float64, (), type(value))
    raise SpecError(
        f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state ({name!r}). Tensors and numbers can "
        "be shared by a team; use another optimizer."
    )
